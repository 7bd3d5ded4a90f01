"""Encoding: what the model sees, where a response begins and ends, and how too much text is shortened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from preftune.data import (
    Dialogue,
    Encoder,
    RejectedRow,
    Turn,
    distinct_prompts,
    first_encoded,
    parse_prompt,
    read_preferences,
    split_pair,
)
from preftune.errors import ConfigError, DataError
from sweeps import ALL, every

START = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
PAIR = split_pair(START + " Because it is.", START + " I do not know, my friend.")


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer, "transcript", 256, 256)


def shown(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_row_is_the_transcript_and_one_end_token(encoder: Encoder) -> None:
    prompt, chosen, rejected = encoder.pair(PAIR)
    assert shown(encoder, prompt) == START
    assert shown(encoder, prompt + chosen) == START + " Because it is.<|endoftext|>"
    assert shown(encoder, prompt + rejected) == START + " I do not know, my friend.<|endoftext|>"
    for ids in (chosen, rejected):
        assert ids.count(encoder.eos_id) == 1
        assert ids[-1] == encoder.eos_id
    assert encoder.decode(chosen) == PAIR.chosen


def test_masks_come_from_lengths_although_padding_is_the_end_token(encoder: Encoder) -> None:
    # The replaced pipeline attended to padding, and either learned hundreds of end tokens or none.
    assert encoder.pad_id == encoder.eos_id
    batch = encoder.pairs([PAIR, replace(PAIR, chosen=" Yes.", rejected=" No, no, no, no, no.")])
    for side, texts in ((batch.chosen, (PAIR.chosen, " Yes.")), (batch.rejected, (PAIR.rejected, None))):
        for row, text in enumerate(texts):
            ids, real, written = side.ids[row], side.attention[row], side.response[row]
            assert not (written & ~real).any()
            assert torch.equal(real, torch.arange(len(ids)) < real.sum())
            assert encoder.tokenizer.decode(ids[real & ~written]) == START
            assert (ids[written] == encoder.eos_id).sum() == 1
            assert ids[written][-1] == encoder.eos_id
            if text:  # the response is the last turn alone, not the human's words too
                assert encoder.decode(ids[written].tolist()) == text


def test_each_prompt_is_sampled_as_it_was_trained_on(encoder: Encoder) -> None:
    # The replaced pipeline sampled everything from one constant prompt with another separator.
    prompts = [PAIR.prompt, parse_prompt("Is it so?"), parse_prompt("And now?")]
    batch = encoder.prompts(prompts, [7, 8, 9])
    assert batch.seeds == (7, 8, 9)
    sampled = [row[mask].tolist() for row, mask in zip(batch.ids, batch.attention, strict=True)]
    assert sampled == [encoder.sequence(prompt, " Yes.")[0] for prompt in prompts]
    assert len({tuple(ids) for ids in sampled}) == 3
    assert bool(batch.attention[:, -1].all())


def test_responses_without_an_end(encoder: Encoder) -> None:
    batch = encoder.sequences([(PAIR.prompt, " Yes."), (PAIR.prompt, " Yes.")], ended=[True, False])
    ended, open_ = (batch.ids[i][batch.response[i]].tolist() for i in (0, 1))
    assert ended == [*open_, encoder.eos_id]
    assert encoder.response("", ended=True) == [encoder.eos_id]
    assert encoder.response("", ended=False) == []
    assert encoder.sequence(PAIR.prompt, " Yes.") == (
        encoder.prompt(PAIR.prompt),
        ended,
    )  # by default it ends
    with pytest.raises(ValueError, match="zip"):
        encoder.sequences([(PAIR.prompt, " Yes.")], ended=[True, False])


def test_padding_and_truncation_baked_into_tokenizer_json_do_nothing(tmp_path: Path) -> None:
    made = make_tokenizer(["<|endoftext|>"])
    backend = made.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=64, pad_id=0, pad_token="<|endoftext|>")  # noqa: S106
    backend.save(str(tmp_path / "tokenizer.json"))
    end = "<|endoftext|>"
    baked = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=end)
    baked.model_max_length = 5
    plain = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer([end]).backend_tokenizer, eos_token=end)
    rows = [Encoder(each, "transcript", 256, 256).pair(PAIR) for each in (baked, plain)]
    assert rows[0] == rows[1]
    assert len(rows[0][0]) > 5


def test_the_differing_last_turn_survives_a_prompt_that_is_too_long(encoder: Encoder) -> None:
    # The replaced pipeline cut on the right, which made such pairs equal.
    long = Dialogue([Turn("human", " why" * 2000), Turn("assistant", " So."), *PAIR.prompt])
    prompt, chosen, rejected = encoder.pair(replace(PAIR, prompt=long))
    assert shown(encoder, prompt) == START
    assert (chosen, rejected) == encoder.pair(PAIR)[1:]


def test_old_turns_go_first_and_a_human_turn_comes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(role, f" {role} {i}") for i in range(6) for role in ("human", "assistant")][:-1]
    whole = Dialogue(turns)
    full = Encoder(tokenizer, "transcript", 10_000, 8).prompt(whole)
    suffixes = {Dialogue(turns[i:]).transcript() for i in range(0, len(turns), 2)}
    for limit in range(1, len(full) + 2):
        encoder = Encoder(tokenizer, "transcript", limit, 8)
        ids = encoder.prompt(whole)
        assert 1 <= len(ids) <= limit
        assert full[-1:] == ids[-1:]
        text = shown(encoder, ids)
        if limit >= len(encoder._plain(Dialogue(turns[-1:]).transcript())):
            assert text in suffixes
            # and no more was dropped than had to be
            longer = [s for s in suffixes if len(s) > len(text)]
            assert all(len(encoder._plain(s)) > limit for s in longer)
    assert Encoder(tokenizer, "transcript", len(full), 8).prompt(whole) == full


@pytest.mark.parametrize("before", [[], [Turn("human", " So?"), Turn("assistant", " So.")]])
def test_a_last_human_turn_that_is_too_long_keeps_its_end(
    tokenizer: PreTrainedTokenizerFast, before: list[Turn]
) -> None:
    encoder = Encoder(tokenizer, "transcript", 60, 8)
    ids = encoder.prompt(Dialogue([*before, Turn("human", "Xx" * 500 + " the end ✓")]))
    text = shown(encoder, ids)
    assert len(ids) == 60
    assert text.startswith(("\n\nHuman:x", "\n\nHuman:X"))
    assert text.endswith("x the end ✓\n\nAssistant:")
    for limit in range(30, 34):  # a character of three tokens is kept whole or not at all
        encoder = Encoder(tokenizer, "transcript", limit, 8)
        assert "\ufffd" not in shown(encoder, encoder.prompt(parse_prompt("✓" * 300)))


def test_a_first_turn_is_cut_so_that_all_of_the_template_stays() -> None:
    made = make_tokenizer(["<end>"], eos_token="<end>")  # noqa: S106
    made.chat_template = "!{{ messages[0]['content'] }}"
    encoder = Encoder(made, "chat", 8, 8)
    assert shown(encoder, encoder.prompt(parse_prompt("X" * 20))) == "!" + "X" * 7


def test_what_follows_the_turn_that_is_cut_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Dialogue([Turn("human", "x" * 500), Turn("assistant", " So.")])
    encoder = Encoder(tokenizer, "transcript", 60, 8)
    assert shown(encoder, encoder.prompt(prompt)).endswith("x\n\nAssistant: So.\n\nAssistant:")


def test_prompts_without_a_human_turn_are_cut_too(tokenizer: PreTrainedTokenizerFast) -> None:
    for turns in ([], [Turn("system", "x" * 500)], [Turn("assistant", "x" * 500)]):
        whole = Encoder(tokenizer, "transcript", 1000, 8).prompt(Dialogue(turns))
        for limit in (3, 30):
            ids = Encoder(tokenizer, "transcript", limit, 8).prompt(Dialogue(turns))
            assert len(ids) == min(limit, len(whole))
            assert ids[-3:] == whole[-3:]


def test_a_prompt_of_just_the_allowed_length_is_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Dialogue([Turn("system", " Be brief."), Turn("human", " Hi")])
    whole = Encoder(tokenizer, "transcript", 1000, 8).prompt(prompt)
    assert Encoder(tokenizer, "transcript", len(whole), 8).prompt(prompt) == whole


def test_responses_are_cut_on_the_right_and_then_do_not_end(tokenizer: PreTrainedTokenizerFast) -> None:
    full = Encoder(tokenizer, "transcript", 64, 1000).response(PAIR.rejected)
    for limit in range(1, len(full) + 3):
        ids = Encoder(tokenizer, "transcript", 64, limit).response(PAIR.rejected)
        assert ids == full[:limit]
        assert (ids[-1] == tokenizer.eos_token_id) == (limit >= len(full))


def test_unusable_pairs_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, "transcript", 64, 8, max_length=64)
    equal = replace(PAIR, chosen=" qqqqqqqqqq a", rejected=" qqqqqqqqqq b")
    large = replace(PAIR, prompt=parse_prompt("z" * 100))
    assert encoder.response(equal.chosen) == encoder.response(equal.rejected)
    with pytest.raises(RejectedRow, match="response_too_long_became_equal"):
        encoder.pair(equal)
    with pytest.raises(RejectedRow, match="longer_than_context"):
        encoder.sequence(large.prompt, large.chosen)
    ids = encoder.sequence(PAIR.prompt, " a")
    just = Encoder(tokenizer, "transcript", 64, 8, max_length=len(ids[0] + ids[1]))
    assert just.sequence(PAIR.prompt, " a") == ids
    kept, rejected = encoder.usable([equal, PAIR, large, large])
    assert kept == [PAIR]
    assert rejected == {"longer_than_context": 2, "response_too_long_became_equal": 1}


@pytest.mark.parametrize(("limit", "wanted", "met"), [(1, 1, 1), (2, 2, 3), (3, 2, 3), (None, 2, 3)])
def test_the_first_usable_rows_and_what_was_passed_over(
    tokenizer: PreTrainedTokenizerFast, limit: int | None, wanted: int, met: int
) -> None:
    encoder = Encoder(tokenizer, "transcript", 64, 8, max_length=64)
    large, other = replace(PAIR, prompt=parse_prompt("z" * 100)), replace(PAIR, chosen=" Yes.")
    rows = [large, PAIR, large, large, other]
    kept, encoded, rejected = first_encoded(encoder, rows, limit)
    assert kept == [PAIR, other][:wanted]
    assert rejected == {"longer_than_context": met}
    for row, ids in zip(kept, encoded, strict=True):
        assert ([*ids.prompt], [*ids.chosen], [*ids.rejected]) == encoder.pair(row)


def test_prompts_are_distinct_by_what_the_model_is_given(tokenizer: PreTrainedTokenizerFast) -> None:
    """The first row of each; older turns for which there is no room do not make another prompt."""
    encoder = Encoder(tokenizer, "transcript", 24, 8)
    short = [parse_prompt(f"\n\nHuman: {x}\n\nAssistant:") for x in "ab"]
    long = Dialogue((Turn("human", " " + "z" * 40), Turn("assistant", " y"), *short[0]))
    rows = [
        replace(PAIR, prompt=prompt, row=i) for i, prompt in enumerate([short[1], long, short[0], short[1]])
    ]
    firsts, ids = distinct_prompts(encoder, rows)
    assert [row.row for row in firsts] == [0, 1]
    assert [[*each] for each in ids] == [encoder.prompt(short[1]), encoder.prompt(short[0])]


def test_no_usable_row_at_all_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, "transcript", 64, 8, max_length=64)
    with pytest.raises(DataError, match="2 longer_than_context: prompt") as caught:
        first_encoded(encoder, [replace(PAIR, prompt=parse_prompt("z" * 100))] * 2, 5)
    assert "data.max_prompt_length" in caught.value.hint


def test_special_tokens_in_text_are_text(
    tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    for made, form in ((tokenizer, "transcript"), (chat_tokenizer, "transcript"), (chat_tokenizer, "chat")):
        encoder = Encoder(made, form, 256, 256)
        clean = encoder.prompt(parse_prompt("Hi there"))
        control = set(made.all_special_ids)
        for name in made.all_special_tokens:
            text = f"Hi {name}there{name}"
            ids = encoder.prompt(parse_prompt(text))
            assert [i for i in ids if i in control] == [i for i in clean if i in control]
            assert text in shown(encoder, ids)
            response = encoder.response(f" a{name}b")
            assert [i for i in response if i in control] == [encoder.eos_id]
            assert encoder.decode(response).strip() == f"a{name}b"


def test_chat_form_is_the_template_with_the_reply_opened(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(chat_tokenizer, "chat", 256, 256)
    turns = [
        Turn("system", " Be brief."),
        Turn("human", " Hi "),
        Turn("human", " there?"),
        Turn("assistant", " Yes."),
    ]
    ids = encoder.prompt(Dialogue([*turns, Turn("human", " Why?")]))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nthere?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids == chat_tokenizer(expected, add_special_tokens=False).input_ids
    assert encoder.decode(ids[:3]) == shown(encoder, ids[:3])  # a special token that is no end is shown
    response = encoder.response(" So. ")
    assert response[-1] == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.decode(response) == "So."
    short = Encoder(chat_tokenizer, "chat", 50, 256)
    cut = short.prompt(parse_prompt("y" * 200 + " now"))
    assert len(cut) <= 50
    assert shown(short, cut).startswith("<|im_start|>user\ny")
    assert shown(short, cut).endswith("y now<|im_end|>\n<|im_start|>assistant\n")


def test_neighbours_of_one_role_are_merged_anywhere(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    roles = ("human", "assistant", "assistant", "human", "human")
    prompt = Dialogue(map(Turn, roles, "abcde"))
    encoder = Encoder(chat_tokenizer, "chat", 256, 256)
    assert shown(encoder, encoder.prompt(prompt)) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb\n\nc<|im_end|>\n"
        "<|im_start|>user\nd\n\ne<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_turns_are_one_empty_message(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(chat_tokenizer, "chat", 256, 256)
    text = shown(encoder, encoder.prompt(Dialogue()))
    assert text == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


def test_template_and_messages_are_encoded_together_unless_a_message_spells_a_special_token() -> None:
    made = make_tokenizer(["<end>"], eos_token="<end>")  # noqa: S106
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoder = Encoder(made, "chat", 256, 256)
    plain = encoder.prompt(parse_prompt("the sky"))
    assert plain == made("user: the sky\nassistant:", add_special_tokens=False).input_ids
    assert plain[5:] != made("the sky\nassistant:", add_special_tokens=False).input_ids  # " the" is one token
    spelled = encoder.prompt(parse_prompt("the <end> sky"))
    assert shown(encoder, spelled) == "user: the <end> sky\nassistant:"
    assert made.eos_token_id not in spelled


@pytest.mark.parametrize("excess", [0, 1])
def test_a_template_may_add_65536_characters_and_64_for_each_of_a_message(excess: int) -> None:
    made = make_tokenizer(["<end>"], eos_token="<end>")  # noqa: S106
    length = 65536 + 64 * 3 + excess
    made.chat_template = "{{ '..' * %d }}{{ '.' * %d }}" % divmod(length, 2)  # noqa: UP031
    encoder = Encoder(made, "chat", 70_000, 64)
    if not excess:
        assert shown(encoder, encoder.prompt(parse_prompt("abc"))) == "." * length
        return
    with pytest.raises(DataError, match="too much text") as caught:
        encoder.prompt(parse_prompt("abc"))
    assert "another model" in caught.value.hint


def test_a_hostile_or_failing_template_is_an_error(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    made = make_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")  # noqa: S106
    for template in ("{{ 'x' * 10000000 }}", "{{ raise_exception('no') }}", "{% if %}"):
        made.chat_template = template
        with pytest.raises(DataError, match="chat template") as caught:
            Encoder(made, "chat", 64, 64).prompt(parse_prompt("Hi"))
        assert "data.form=transcript" in caught.value.hint or "another model" in caught.value.hint
    made.chat_template = "{{ '' }}"
    assert Encoder(made, "chat", 64, 64).prompt(parse_prompt("Hi")) == [made.eos_token_id]


def test_a_beginning_token_is_used_where_the_tokenizer_adds_one() -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = make_tokenizer(list(names.values()), **names)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    encoder = Encoder(made, "transcript", 256, 256)
    prompt, chosen, _ = encoder.pair(PAIR)
    assert prompt[0] == 0
    assert (prompt + chosen).count(0) == 1
    assert encoder.pad_id == made.pad_token_id == 2
    assert shown(encoder, prompt[1:]) == START


def test_unusable_tokenizers_and_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no end token") as caught:
        Encoder(make_tokenizer(["<pad>"]), "transcript", 8, 8)
    assert "eos_token" in caught.value.hint
    with pytest.raises(ConfigError, match="no chat template") as caught:
        Encoder(tokenizer, "chat", 8, 8)
    assert "data.form=transcript" in caught.value.hint
    with pytest.raises(ConfigError, match="must be 1 or more"):
        Encoder(tokenizer, "transcript", 0, 8)


def test_half_a_surrogate_pair_is_an_error_of_ours(encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"surrogate pair at character 3\n") as caught:
        encoder.response(" a\ud800")
    assert "not valid Unicode" in caught.value.hint
    with pytest.raises(DataError, match="surrogate"):
        encoder.prompt(parse_prompt("a\ud800"))


texts = st.text(st.characters(codec="utf-8"), max_size=40)
dialogues = st.lists(st.builds(Turn, st.sampled_from(["human", "assistant", "system"]), texts), max_size=5)


@settings(max_examples=300 if ALL else 100, derandomize=True, deadline=None)
@given(
    turns=dialogues, response=texts, limit=st.integers(1, 60), form=st.sampled_from(["transcript", "chat"])
)
def test_lengths_hold_for_any_text(
    chat_tokenizer: PreTrainedTokenizerFast, turns: list[Turn], response: str, limit: int, form: Any
) -> None:
    encoder = Encoder(chat_tokenizer, form, limit, limit)
    prompt, written = encoder.sequence(Dialogue(turns), response)
    assert 1 <= len(prompt) <= limit
    assert 1 <= len(written) <= limit
    assert encoder.prompt(Dialogue(turns)) == prompt
    if form == "transcript" and written[-1] == encoder.eos_id:
        assert encoder.decode(written) == response


def test_a_megabyte_is_shortened_in_time(encoder: Encoder) -> None:
    for text in (" word" * 200_000, "x" * 1_000_000, "✓" * 300_000):
        assert 250 < len(encoder.prompt(Dialogue([Turn("human", text)]))) <= 256
        assert len(encoder.response(text)) == 256
    many = Dialogue([Turn("human" if i % 2 else "assistant", " some words") for i in range(50_000)])
    assert len(encoder.prompt(many)) <= 256


def test_apart_is_the_same_as_joined_on_real_rows(hh_directory: Path, gpt2_tokenizer: Any) -> None:
    encoder = Encoder(gpt2_tokenizer, "transcript", 10_000, 10_000)
    pairs = every(2, read_preferences(hh_directory if ALL else hh_directory / "helpful-base"))
    rows = [encoder.pair(pair) for pair in pairs]
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    for side, name in ((1, "chosen"), (2, "rejected")):
        joined = gpt2_tokenizer([p.prompt.transcript() + getattr(p, name) for p in pairs], **plain).input_ids
        assert all(
            row[0] + row[side] == [*ids, encoder.eos_id] for row, ids in zip(rows, joined, strict=True)
        )


def test_limits_on_real_rows(hh_directory: Path, gpt2_tokenizer: Any) -> None:
    encoder = Encoder(gpt2_tokenizer, "transcript", 64, 12, max_length=70)
    pairs = read_preferences(hh_directory / "helpful-rejection-sampled/validation.jsonl.gz")
    kept, rejected = encoder.usable(pairs)
    assert len(kept) + sum(rejected.values()) == len(pairs)
    assert set(rejected) == {"longer_than_context", "response_too_long_became_equal"}
    batch = encoder.pairs(kept[:64])
    assert batch.chosen.ids.shape[1] <= 70


def test_a_prompt_is_shown_as_it_is_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = parse_prompt("the sky")
    plain = Encoder(tokenizer, "plain", 256, 256)
    assert plain.readable_prompt(prompt) == "the sky"
    assert plain.prompt(prompt) == plain.text("the sky")
    assert Encoder(tokenizer, "transcript", 256, 256).readable_prompt(prompt) == prompt.transcript()
