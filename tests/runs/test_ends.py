"""A chat model whose replies end where its template says: handles, saved configs, judges, whole runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

import preftune
from preftune.api import run_recipe
from preftune.audit.files import check_files, open_directory
from preftune.data import Dialogue, Encoder, Preference, Turn, pad_sequences
from preftune.data.corpus import train_tokenizer
from preftune.errors import DataError
from preftune.models.load import declared_ends, load_tokenizer
from preftune.models.locate import Source
from preftune.models.roles import Policy, RewardModel
from preftune.models.scalar import init_scalar_model
from preftune.rollout.sample import ended, sample
from preftune.rollout.score import Scorer
from preftune.rundir import write_jsonl
from tiny import EOS, causal_lm, classifier, prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = [{"role": "user", "content": "Hi"}]


def chat_tokenizer(template: str = CHATML, merges: int = 0) -> Any:
    """Its end token is not the one that ChatML closes a turn with."""
    row = Preference(prompt=Dialogue([Turn("human", " Hi there")]), chosen=" Ok then.", rejected=" No.")
    made: Any = train_tokenizer([row] * 3, 257 + merges)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def save_base(directory: Path, tokenizer: Any) -> Path:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=160,
        n_embd=16,
        n_layer=1,
        n_head=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), chat_tokenizer())


def test_any_of_several_ids_ends_a_sampled_reply() -> None:
    policy = Policy(causal_lm(1))
    one: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0}
    free = sample(policy, prompts(1, 6), **one, eos_id=EOS)
    other = int(free.ids[0][free.response[0]][1])
    both = sample(policy, prompts(1, 6), **one, eos_id=[EOS, other])
    assert both.ids[0][both.response[0]].tolist() == free.ids[0][free.response[0]][:2].tolist()
    for row in range(6):
        words = both.ids[row][both.response[row]].tolist()
        assert not {EOS, other} & set(words[:-1])
        assert bool(ended(both, [EOS, other])[row]) == (words[-1] in (EOS, other))


def test_ends_are_read_from_both_configs(base: Path) -> None:
    assert declared_ends(Source(str(base))) == (0,)
    file = base / "generation_config.json"
    before = file.read_text()
    GenerationConfig(eos_token_id=[0, 258]).save_pretrained(base)
    assert declared_ends(Source(str(base))) == (0, 258)
    file.write_text(before)


def chat_ids(tokenizer: Any, messages: Sequence[Any], opened: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("recorded", "behind"),
    [(None, 1), ({"form": "chat", "template_arguments": {}}, 1), ({"form": "chat", "stage": "rm"}, 0)],
)
def test_a_handle_takes_finished_text_and_messages(
    base: Path, tmp_path: Path, recorded: Any, behind: int
) -> None:
    """Messages of a model from elsewhere are read behind the line break its template writes after a turn,
    those of a stage of ours, and text, at the end token.
    """
    source, tokenizer = Source(str(base)), load_tokenizer(Source(str(base)))
    init_scalar_model(source, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if recorded:
        (tmp_path / "preftune.json").write_text(json.dumps(recorded))
    model = preftune.load_reward_model(tmp_path)
    answered = [*ASKED, {"role": "assistant", "content": "Ok."}]
    ids = chat_ids(tokenizer, answered, False)
    expected = []
    for length in (len(ids) - 1, len(ids) - 1 + behind):
        row = torch.tensor([ids[:length]])
        with torch.no_grad():
            expected.append(model.role.model(row, attention_mask=torch.ones_like(row)).logits[0, 0].item())
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert model.raw_score([text, ASKED], ["Ok.", " Ok. "]).tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match="no list of messages"):
        model.score([[{"role": "robot", "content": "Hi"}]], ["Ok."])
    for form in ("chat", "transcript", "plain"):
        (tmp_path / "preftune.json").write_text(json.dumps({"form": form}))
        assert preftune.load_reward_model(tmp_path).encoder.form == form
    (tmp_path / "preftune.json").write_text('{"form": "poem"}')
    with pytest.raises(DataError, match="not as preftune writes it"):
        preftune.load_reward_model(tmp_path)


def test_a_judge_reads_the_dialogue_in_its_own_template() -> None:
    own = Encoder(chat_tokenizer(), "chat", 60, 20)
    theirs = Encoder(chat_tokenizer(OTHER, 20), "chat", 60, 20, 80)
    row = Preference(prompt=Dialogue([Turn("human", " Hi there")]), chosen=" Ok then.", rejected=" No.")
    judge = RewardModel(classifier(3, len(theirs.tokenizer)), 0.3, 2.0)
    scorer = Scorer(reward_model=judge, encoder=own, translate=theirs, rows=[row])
    batch = own.sequences([(row.prompt, row.chosen), (row.prompt, row.rejected)], [True, False])
    begin = theirs.tokenizer.bos_token_id
    want = []
    for text, closed in (("Ok then.", True), ("No.", False)):
        parts = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": text}]
        ids = chat_ids(theirs.tokenizer, parts, False)
        assert begin in ids[:1]
        want.append(ids if closed else ids[:-1])
    with torch.no_grad():
        expected = judge.normalised(judge.raw_scores(pad_sequences([[], []], want, theirs.pad_id)))
    torch.testing.assert_close(scorer.scores(batch, [0, 0]), expected, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="no data row"):
        Scorer(reward_model=judge, encoder=own, translate=theirs).scores(batch)


def test_a_run_states_the_end_that_it_trained(base: Path, tmp_path: Path) -> None:
    """SFT, reward model and PPO on a base whose configs know another end: `generate` stops."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Hi {i}"}],
            "chosen": [{"role": "assistant", "content": "Ok."}],
            "rejected": [{"role": "assistant", "content": "Never."}],
        }
        for i in range(60)
    ]
    rows[7]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    data = tmp_path / "train.jsonl"
    write_jsonl(data, rows)
    overrides = [
        *(f"model.base={base}", f"data.name={data}", "data.form=chat", "data.max_prompt_length=60"),
        *("stage.sft.rows=none", "stage.sft.epochs=40", "stage.sft.learning_rate=1e-2", "stage.grpo=none"),
        *("stage.dpo=none", "stage.ppo.steps=1", "evaluation.prompts=4", "evaluation.pool=4"),
    ]
    run_recipe("tiny", overrides, out=str(tmp_path / "run"))
    for name in ("policy_sft", "policy_ppo", "reward_model"):
        directory = tmp_path / "run/models" / name
        config = json.loads((directory / "config.json").read_text())
        assert config["eos_token_id"] == [258, 0]
        side = json.loads((directory / "preftune.json").read_text())
        assert (side["form"], side["template_arguments"]) == ("chat", {})
        checks = {check.name: check for check in check_files(open_directory(directory))}
        assert checks["has an end token"].status == "ok"
        assert "<|im_end|>" in checks["has an end token"].found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/models/policy_sft")
    assert model.generation_config.eos_token_id == [258, 0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/models/policy_sft")
    ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": "Hi 3"}], True)])
    reply = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()
    assert tokenizer.decode(reply) == "Ok.<|im_end|>"
    question = [{"role": "user", "content": "Hi 3"}]
    # As finished text, too: its markers are tokens, not words.
    written = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    handle = preftune.load_policy(tmp_path / "run/models/policy_sft")
    assert handle.generate([question, written], temperature=0) == ["Ok.", "Ok."]
    assert handle.encoder.text(written) == ids[0].tolist()
    summary = json.loads((tmp_path / "run/evaluation/policy_sft.json").read_text())
    assert summary["eos_rate"]["value"] > 0.9
