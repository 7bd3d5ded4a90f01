"""A reward model from elsewhere as judge: own tokenizer, own chat template, own unit; refused if broken."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import prose
from preftune import api
from preftune.config import load_recipe
from preftune.data import Dialogue, Turn
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.rollout.score import Scorer
from preftune.rundir import RunDir
from preftune.runs.cards import _loading
from preftune.runs.stages import Stage
from preftune.runs.standalone import load_policy, load_reward_model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
SMALL = ("stage.ppo.steps=1", "stage.ppo.batch_size=8", "stage.ppo.epochs=1", "stage.ppo.minibatches=1")
ROLES = {"human": "user", "assistant": "assistant", "system": "system"}


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A Llama with other tokens than the policy, a chat template, and no preftune.json."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator(["What colour is the lamp? The lamp is red."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **NAMES)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            num_labels=1,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
        )
        config.initializer_range = 0.3
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


@pytest.fixture
def begun(tmp_path: Path, tiny_run: RunDir) -> RunDir:
    """The tiny run up to SFT."""
    run = RunDir(shutil.copytree(tiny_run.path, tmp_path / "run"))
    for stage in ("rm", "ppo", "grpo", "dpo", "evaluation"):
        shutil.rmtree(run.stage_dir(stage), ignore_errors=True)
    for model in run.models.iterdir():
        if model.name not in ("base", "policy_sft"):
            shutil.rmtree(model)
    return run


def train(run: RunDir, judge: Path) -> None:
    api.run_recipe("tiny", [*SMALL, f"stage.ppo.reward_model={judge}"], out=str(run.path), until="ppo")


def own_score(judge: Path, scorer: Scorer, row: int, response: str, ended: bool) -> float:
    """As anybody would ask it: the template's text, the model's own forward."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(judge)
    messages = [{"role": ROLES[t.role], "content": t.text.strip()} for t in scorer.rows[row].prompt]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": response.strip()}], tokenize=False
    )
    assert text.endswith("<|im_end|>\n")  # the line feed is the last token, where TRL reads the score, too
    text = text if ended else text.removesuffix("<|im_end|>\n")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    model: Any = LlamaForSequenceClassification.from_pretrained(judge).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_it_scores_what_its_own_template_writes_and_a_mean_that_it_states_is_taken(
    judge: Path, begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (judge / "preftune.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    asked: list[Any] = []
    scored = Scorer.scored

    def heard(self: Scorer, sequences: Any, rows: Any = ()) -> Any:
        found = scored(self, sequences, rows)
        asked.append((self, sequences, rows, found.scores))
        return found

    monkeypatch.setattr(Scorer, "scored", heard)
    train(begun, judge)
    (scorer, sequences, rows, found), *_ = asked
    for i, own in enumerate(sequences.response):
        response = sequences.ids[i][own].tolist()
        ended = response[-1] in scorer.encoder.ends
        raw = own_score(judge, scorer, rows[i], scorer.encoder.decode(response), ended)
        assert found[i].item() == pytest.approx((raw - 0.5) / 2, abs=1e-5)
    log = json.loads(begun.stage_json("ppo").read_text())
    assert "rm" not in log["parents"]
    (judge / "preftune.json").write_text(json.dumps({"mean": 0.25, "std": 2.0}))  # another judge
    with pytest.raises(ConfigError, match="side_sha256"):
        train(begun, judge)


@pytest.mark.parametrize(("as_text", "end"), [(True, "<|im_end|>"), (False, "<|im_end|>\n")])
def test_text_is_read_as_it_is_written_and_messages_to_the_end_of_the_turn(
    judge: Path, as_text: bool, end: str
) -> None:
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(judge)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model: Any = LlamaForSequenceClassification.from_pretrained(judge).eval()
    handle = load_reward_model(judge)
    for ended in (True, False):
        ids = tokenizer(text + "Yes." + end * ended, add_special_tokens=False).input_ids
        with torch.no_grad():
            expected = float(model(torch.tensor([ids])).logits[0, 0])
        score = handle.raw_score([text if as_text else messages], ["Yes."], ended=ended)
        assert score.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("form", ["transcript", "chat", "plain"])
@pytest.mark.parametrize("trains_policy", [False, True])
def test_the_code_on_a_card_asks_in_the_form_that_the_model_was_trained_in(
    judge: Path, form: str, trains_policy: bool
) -> None:
    settings = SimpleNamespace(temperature=0.7, max_new_tokens=2)
    data = SimpleNamespace(form=form, template_arguments={})
    session: Any = SimpleNamespace(config=SimpleNamespace(data=data, evaluation=settings))
    (judge / "preftune.json").write_text(json.dumps({"stage": "own", "form": form}))
    if trains_policy:
        scores = LlamaForSequenceClassification.from_pretrained(judge)
        LlamaForCausalLM(scores.config).save_pretrained(judge)
    stage = Stage(name="own", algorithm="sft" if trains_policy else "reward", parents=(), inputs={})
    code, names = _loading(session, stage).removeprefix("```python").removesuffix("```"), dict[str, Any]()
    exec(code.replace("THIS_DIRECTORY", str(judge)), names)  # noqa: S102 - our own card
    if not trains_policy:
        own = load_reward_model(judge).raw_score([names["prompt"]], [names["response"]])
        assert names["raw"].item() == pytest.approx(own.item(), abs=1e-6)
        return
    encoder, asked = load_policy(judge).encoder, names["prompt"]
    prompt = Dialogue([Turn("human", " Hello")]) if form == "chat" else asked
    wanted = encoder.prompt(prompt) if isinstance(prompt, Dialogue) else encoder.text(prompt)
    assert names["reply"][0].tolist()[: len(wanted)] == wanted
    assert names["as_measured"]["temperature"] == 0.7


def test_a_judge_without_a_unit_is_measured_and_a_broken_one_is_refused_before_training(
    judge: Path, begun: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    train(begun, judge)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "states no mean and sd" in line)
    prose.compare(
        "runs/outside_judge: a judge without a unit", line.replace(str(judge), "JUDGE").rpartition(": ")[0]
    )
    shutil.rmtree(begun.stage_dir("ppo"))
    shutil.rmtree(begun.model_dir("ppo"))
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    with pytest.raises(DataError, match="not usable"):
        train(begun, judge)
    with pytest.raises(DataError, match="a policy, which has no number to give"):
        train(begun, begun.model_dir("sft"))
    with pytest.raises(InputMissing, match=r"reward_model = .*nowhere: no such directory"):
        train(begun, judge / "nowhere")
    assert not begun.stage_dir("ppo").exists()


def test_a_name_without_a_slash_is_a_stage() -> None:
    with pytest.raises(ConfigError, match=r"or \./DIRECTORY"):
        load_recipe("tiny", ["stage.ppo.reward_model=judge"])
