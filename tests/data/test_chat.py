"""Chat templates of twelve families: prompt and reply have the ids of the template's own rendering."""

from dataclasses import replace
from typing import Any

import pytest
from chat_families import FAMILIES, Family
from data_helpers import CORPUS, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preftune.data import (
    Dialogue,
    Encoder,
    Preference,
    RejectedRow,
    Turn,
    first_encoded,
    parse_prompt,
    split_pair,
)
from preftune.errors import ConfigError, DataError
from preftune.rollout.score import read_alike

CHATS = {
    "one question": [("human", "Hi")],
    "three turns": [("human", "Hi"), ("assistant", "Hello"), ("human", "Why is the sky blue?")],
    "reasoning before": [("human", "Hi"), ("assistant", "<think>hm</think>Hello"), ("human", "Why?")],
    "system": [("system", "Be brief."), ("human", "Hi")],
}
SPEC = {"add_special_tokens": False}


def byte_level(special: list[str], **names: Any) -> PreTrainedTokenizerFast:
    return make_tokenizer(special, **names)


def spaced(special: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space in front of every text, and decoding takes one away."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *bytes_], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    made = Tokenizer(backend.model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(strip)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def encoder(family: Family, make: Any = byte_level, **more: Any) -> Encoder:
    names = {"bos_token": "<s>"} if "<s>" in family.special else {}
    made = make(list(family.special), eos_token=family.eos, **names)
    made.chat_template = family.template
    return Encoder(made, "chat", 400, 400, **more)


def dialogue(turns: list[tuple[Any, str]]) -> Dialogue:
    return Dialogue(Turn(role, f" {text}") for role, text in turns)


def rendered(own: Encoder, turns: list[tuple[Any, str]], opened: bool = False) -> str:
    messages = [{"role": "user" if role == "human" else role, "content": text} for role, text in turns]
    text: Any = own.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    return text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_judge_from_elsewhere_reads_to_the_end_of_what_the_template_writes(name: str) -> None:
    policy, judge, turns = (
        encoder(FAMILIES[name]),
        encoder(FAMILIES[name], whole_turns=True),
        CHATS["one question"],
    )
    whole: Any = judge.tokenizer(rendered(judge, [*turns, ("assistant", "Yes.")]), **SPEC).input_ids
    prompt, reply = judge.sequence(dialogue(turns), " Yes.")
    assert (prompt + reply)[-4:] == whole[-4:]
    assert read_alike(policy, judge) == (policy.sequence(dialogue(turns), " Yes.")[1] == reply)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("make", [byte_level, spaced])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_reply_are_the_templates_own_rendering(name: str, make: Any, chat: str) -> None:
    family = FAMILIES[name]
    own, turns = encoder(family, make), CHATS[chat]
    if name == "Llama 3":  # its date is another one tomorrow
        own = encoder(family, make, template_arguments={"date_string": "1 May 2024"})
        own.tokenizer.chat_template = "{% set date_string = '1 May 2024' %}" + family.template
    if turns[0][0] == "system" and not family.system:
        with pytest.raises(RejectedRow, match="no system role"):
            own.sequence(dialogue(turns), " Yes.")
        return
    prompt, reply = own.sequence(dialogue(turns), " Yes.")
    whole: Any = own.tokenizer(rendered(own, [*turns, ("assistant", "Yes.")]), **SPEC).input_ids
    if (name, chat) == ("Mistral", "system"):  # with a reply the rendering has lost the system message
        assert prompt == own.tokenizer(rendered(own, turns, True), **SPEC).input_ids
        assert reply == whole[-len(reply) :]
    else:
        assert prompt + reply == whole[: len(prompt + reply)]
    assert own.tokenizer.decode(reply, clean_up_tokenization_spaces=False).strip() == family.reply.strip()
    assert own.eos_id == reply[-1] == own.ends[0]
    assert own.decode(reply, prompt) == "Yes."
    assert own.tokenizer.eos_token_id in own.ends
    opened = rendered(own, turns, True)
    if name != "R1 distill":
        assert prompt == own.tokenizer(opened, **SPEC).input_ids
    else:
        assert prompt == own.tokenizer(opened.removesuffix("<think>\n"), **SPEC).input_ids
    assert own.sequence(dialogue(turns), " Yes.", False)[1] == reply[: -1 - (name == "Llama 2")]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reply_by_hand(name: str) -> None:
    own = encoder(FAMILIES[name])
    assert (
        own.tokenizer.decode(own.response(" Yes. "), clean_up_tokenization_spaces=False)
        == FAMILIES[name].reply
    )


def test_an_argument_of_the_template_is_a_setting() -> None:
    own = encoder(FAMILIES["Qwen3"], template_arguments={"enable_thinking": False})
    prompt, reply = own.sequence(dialogue(CHATS["one question"]), " Yes.")
    text = own.tokenizer.decode(prompt + reply)
    assert (
        text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>"
    )
    assert own.tokenizer.decode(reply) == "Yes.<|im_end|>"
    with pytest.raises(ConfigError, match="knows no thinking_mode"):
        encoder(FAMILIES["Qwen3"], template_arguments={"thinking_mode": False})


def test_a_judge_that_reads_with_other_arguments_does_not_read_alike() -> None:
    own, same, other = (
        encoder(FAMILIES["Qwen3"], template_arguments={"enable_thinking": thinking})
        for thinking in (False, False, True)
    )
    assert read_alike(own, same)
    assert not read_alike(own, other)


def test_two_days_give_the_same_ids() -> None:
    own = encoder(FAMILIES["Llama 3"])
    assert "26 Jul 2024" in own.tokenizer.decode(own.prompt(parse_prompt("Hi")))


def test_reasoning_that_the_template_drops_is_a_row_left_out_and_counted() -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    good, thought = (
        split_pair(start + " Yes.", start + " No."),
        split_pair(start + " <think>a</think>b", start + " No."),
    )
    kept, rejected = encoder(FAMILIES["R1 distill"]).usable([good, thought])
    assert (kept, rejected) == ([good], {"changed_by_template": 1})
    kept, rejected = encoder(FAMILIES["Qwen3"]).usable([good, thought])
    assert (kept, rejected) == ([good, thought], {})


def test_rows_that_the_template_refuses_are_counted() -> None:
    own = encoder(FAMILIES["Gemma"])
    good = split_pair("\n\nHuman: Hi\n\nAssistant: Yes.", "\n\nHuman: Hi\n\nAssistant: No.")
    system = split_pair("\n\nHuman: Hi\n\nAssistant: Yes.", "\n\nHuman: Hi\n\nAssistant: No.")
    object.__setattr__(system, "prompt", dialogue(CHATS["system"]))
    assert first_encoded(own, [system, good], None)[::2] == ([good], {"refused_by_template": 1})
    assert not own.accepts(system.prompt)
    with pytest.raises(DataError, match="1 refused_by_template"):
        first_encoded(own, [system], None)


def test_no_reply_is_shown_to_no_template() -> None:
    strict = (
        FAMILIES["Gemma"].template + "{% if messages[-1].content == '' %}{{ raise_exception('') }}{% endif %}"
    )
    own = encoder(replace(FAMILIES["Gemma"], template=strict))
    row = Preference(prompt=parse_prompt("Hi"), chosen=" Yes.", rejected="")
    assert own.pair(row) == (*own.sequence(row.prompt, row.chosen), [])


@pytest.mark.parametrize("make", [byte_level, spaced])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_message_that_spells_tokens_is_plain_text_and_changes_nothing_else(name: str, make: Any) -> None:
    own = encoder(FAMILIES[name], make)
    control = {i: str(token) for i, token in own.tokenizer.added_tokens_decoder.items() if token.special}
    turns = CHATS["reasoning before"]
    plain = own.prompt(dialogue(turns))
    for token in control.values():
        spelt = dialogue([("human", f"what {token} is"), *turns[1:]])
        ids, reply = own.sequence(spelt, f" a{token}b \ue000")
        text = own.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert f"what {token} is" in text
        assert ("hm" in text) == ("hm" in own.tokenizer.decode(plain))
        assert [i for i in ids if i in control] == [i for i in plain if i in control]
        assert [i for i in reply if i in control] == [own.eos_id]
        assert own.decode(reply, ids) == f"a{token}b \ue000"


def test_transcripts_behind_a_space_are_the_joined_text() -> None:
    made = spaced(["</s>"], eos_token="</s>")  # noqa: S106
    own = Encoder(made, "transcript", 100, 100)
    prompt, reply = own.sequence(parse_prompt("Why?"), " Because of the light.")
    joined: Any = made("\n\nHuman: Why?\n\nAssistant: Because of the light.", **SPEC).input_ids
    assert prompt + reply == [*joined, made.eos_token_id]
    assert own.decode(reply) == own.decode(reply, prompt) == " Because of the light."
    assert not own.as_before
    assert Encoder(byte_level(["</s>"], eos_token="</s>"), "transcript", 9, 9).as_before  # noqa: S106


def test_declared_ends_end_a_reply() -> None:
    made = byte_level(["</s>", "<stop>"], eos_token="</s>")  # noqa: S106
    own = Encoder(made, "transcript", 100, 100, ends=[0, 1])
    assert own.ends == (0, 1)
    assert own.decode([*own.response(" a", ended=False), 1, *own.response(" b")]) == " a"
