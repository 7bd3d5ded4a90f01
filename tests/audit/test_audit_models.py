"""`preftune audit`: each fixture is a sound model with one planted fault, and exactly that is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import prose
from preftune.audit import audit_directory
from preftune.audit import files as of_files
from preftune.audit import policy as of_policy
from preftune.audit import reward as of_judge
from preftune.audit.files import open_directory
from preftune.audit.reward import rows_of
from preftune.cli import main
from preftune.data.corpus import train_tokenizer
from preftune.models.load import scratch_gpt2
from preftune.models.locate import Source
from preftune.models.scalar import init_scalar_model
from preftune.rundir import read_json

CONTEXT = 320


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM with random weights and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("audit") / "policy"
    tokenizer = train_tokenizer([], 300)
    model = scratch_gpt2(tokenizer, layers=1, width=32, heads=2, positions=CONTEXT, seed=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as preftune would save it, its constants aside."""
    path = tmp_path_factory.mktemp("audit") / "judge"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = init_scalar_model(Source(str(policy)), tokenizer, seed=1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preftune.json").write_text('{"mean": 0.1, "std": 0.5}', encoding="utf-8")
    return path


def wrong(audit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The checks that warn or fail, by name."""
    return {check["name"]: check for check in audit["checks"] if check["status"] in ("fault", "warning")}


def amiss(path: Path) -> set[str]:
    return set(wrong(audit_directory(path)))


def test_sound_models_are_usable(judge: Path, policy: Path) -> None:
    result = audit_directory(judge)
    assert (result["verdict"], result["kind"]) == ("usable", "reward model")
    fine = [check for check in result["checks"] if check["status"] == "ok"]
    assert {(check["consequence"], check["remedy"]) for check in fine} == {("", "")}
    result = audit_directory(policy)
    assert result["kind"] == "policy"
    assert result["faults"] == 0
    assert set(wrong(result)) <= {"ends by itself"}  # random weights rarely do


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_probes_of_a_chat_model_are_what_its_template_writes(policy: Path, tmp_path: Path) -> None:
    """Unless its own file says that it was trained on transcripts."""
    path = Path(shutil.copytree(policy, tmp_path / "chat"))
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    said = (("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."))
    messages = [{"role": role, "content": text} for role, text in said]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer(written, add_special_tokens=False).input_ids
    directory = open_directory(path)
    assert rows_of(directory)[0] == expected
    assert rows_of(directory, ended=False)[0] == expected[:-1]
    assert amiss(path) <= {"ends by itself"}
    (path / "preftune.json").write_text('{"form": "transcript"}', encoding="utf-8")
    assert rows_of(open_directory(path)) == rows_of(open_directory(policy))


def edit(path: Path, file: str, **values: Any) -> None:
    content = json.loads((path / file).read_text(encoding="utf-8"))
    for key, value in values.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    (path / file).write_text(json.dumps(content), encoding="utf-8")


def weights(path: Path, change: Callable[[Any], None]) -> None:
    model = GPT2ForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        change(model)
    model.save_pretrained(path)


def pad_is_end(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    edit(path, "tokenizer_config.json", pad_token=tokenizer.eos_token)
    edit(path, "config.json", pad_token_id=tokenizer.eos_token_id)


def no_pad(path: Path) -> None:
    edit(path, "tokenizer_config.json", pad_token=None)
    edit(path, "config.json", pad_token_id=None)


def pads_differ(path: Path) -> None:
    edit(path, "config.json", pad_token_id=7)


def no_end(path: Path) -> None:
    edit(path, "tokenizer_config.json", eos_token=None)


def too_few_embeddings(path: Path) -> None:
    weights(path, lambda model: model.resize_token_embeddings(250))


def nan_in_head(path: Path) -> None:
    weights(path, lambda model: model.score.weight[0, 3].fill_(torch.nan))


def zero_head(path: Path) -> None:
    weights(path, lambda model: model.score.weight.zero_())


def constants_missing(path: Path) -> None:
    (path / "preftune.json").unlink()
    weights(path, lambda model: model.score.weight.mul_(1000))


def cuts_texts(path: Path) -> None:
    settings = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    edit(path, "tokenizer.json", truncation=settings)


def two_labels(path: Path) -> None:
    model = GPT2ForSequenceClassification.from_pretrained(path, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(path)


def head_left_out(path: Path) -> None:
    GPT2LMHeadModel.from_pretrained(path).save_pretrained(path)
    edit(path, "config.json", architectures=["GPT2ForSequenceClassification"])


def pads_on_the_left(path: Path) -> None:
    edit(path, "tokenizer_config.json", padding_side="left")


PAD, COMPANY = "has its own pad token", "other rows in the batch do not matter"
READ, RIGHT = "where the score is read", "padding on the right does not matter"
FAULTS = [
    (pad_is_end, {PAD, READ, "the end token"}),
    (no_pad, {PAD, COMPANY}),
    (pads_differ, {PAD, RIGHT, COMPANY}),
    (pads_on_the_left, {"padding on the left does not matter"}),
    (no_end, {"has an end token"}),
    (too_few_embeddings, {"vocabulary fits the model"}),
    (nan_in_head, {"weights are finite", "scores"}),
    (zero_head, {"scores"}),
    (constants_missing, {"unit of the score"}),
    (cuts_texts, {"tokenizer neither cuts nor pads by itself"}),
    (two_labels, {"gives one number"}),
    (head_left_out, {"weights are complete"}),
]


@pytest.mark.parametrize(("plant", "named"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_planted_fault_is_found_and_explained(
    judge: Path, tmp_path: Path, plant: Callable[[Path], None], named: set[str]
) -> None:
    path = shutil.copytree(judge, tmp_path / "model")
    plant(path)
    audit = audit_directory(path)
    assert named <= set(wrong(audit))
    assert wrong(audit)[min(named)]["consequence"]
    assert audit["verdict"] != "usable"


@pytest.mark.parametrize(
    ("values", "file", "name"),
    [
        ({"top_k": 5, "top_p": 0.5, "do_sample": True}, "generation_config.json", "sampling settings"),
        ({"eos_token_id": 5}, "config.json", "has an end token"),
        ({"eos_token": None}, "tokenizer_config.json", "has an end token"),
        ({"pad_token": "<|endoftext|>"}, "tokenizer_config.json", PAD),
    ],
)
def test_a_planted_fault_of_a_policy_is_found(
    policy: Path, tmp_path: Path, values: dict[str, Any], file: str, name: str
) -> None:
    path = shutil.copytree(policy, tmp_path / "model")
    edit(path, file, **values)
    assert name in amiss(path)


def test_a_policy_that_never_ends_is_noticed(policy: Path, tmp_path: Path) -> None:
    path = shutil.copytree(policy, tmp_path / "model")
    model = GPT2LMHeadModel.from_pretrained(path)
    with torch.no_grad():
        model.transformer.wte.weight[model.config.eos_token_id] = 0
        model.transformer.wte.weight.mul_(5)  # the tied head: every other token is likelier now and then
        model.transformer.wte.weight[:, 0] += 5.0
        model.transformer.wte.weight[model.config.eos_token_id] = 0
        model.transformer.ln_f.bias[0] = 20.0
    model.save_pretrained(path)
    assert wrong(audit_directory(path))["ends by itself"]["status"] == "warning"


def test_the_command_line_says_what_to_do_about_a_model_that_is_not_supported(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(policy, tmp_path / "model")
    (path / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertLMHeadModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(path)
    assert main(["audit", str(path)]) == 65
    lines = capsys.readouterr().out.splitlines()
    found = next(i for i, line in enumerate(lines) if "supported by preftune: BertLMHeadModel" in line)
    assert lines[found + 1].strip().startswith("what to do: ")
    prose.compare("audit/audit_models: a model that is not supported", *lines[found : found + 2])


def test_the_command_line_gives_verdict_record_and_exit_code(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(judge), "--json", str(tmp_path / "a.json")]) == 0
    assert read_json(tmp_path / "a.json")["verdict"] == "usable"
    path = shutil.copytree(judge, tmp_path / "model")
    nan_in_head(path)
    assert main(["audit", str(path)]) == 65
    shown = capsys.readouterr().out
    assert "FAULT" in shown
    assert shown.rstrip().endswith("not usable")
    assert main(["audit", str(tmp_path / "missing")]) == 66
    (path / "model.safetensors").unlink()
    assert audit_directory(path)["verdict"] == "not usable"


@pytest.mark.parametrize("room", [of_policy, of_judge], ids=["policy", "reward model"])
def test_a_nan_of_one_padding_is_no_ok(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither the first nor the last that is looked at."""
    directory: Any = SimpleNamespace(tokenizer=SimpleNamespace(padding_side="right"))
    monkeypatch.setattr(room, "rows_of", lambda directory: [[1, 2, 3]] * 2)
    monkeypatch.setattr(of_judge, "_alone", lambda directory, rows: torch.zeros(2))

    def computed(directory: Any, rows: Any, width: int, side: str, *_: Any) -> torch.Tensor:
        return torch.full((1,), torch.nan if width == 7 else 0.0)

    monkeypatch.setattr(room, "_logprobs" if room is of_policy else "scores", computed)
    checks = list(room._padding(directory))
    assert len(checks) >= 2
    assert "ok" not in {check.status for check in checks}


def test_a_check_of_files_that_breaks_is_a_finding_beside_the_others(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(directory: object) -> None:
        raise AttributeError("no such setting")

    monkeypatch.setattr(of_files, "_baked_in", breaks)
    checks = {check["name"]: check for check in audit_directory(policy)["checks"]}
    broken = checks["tokenizer neither cuts nor pads by itself"]
    assert broken["status"] == "fault"
    assert broken["found"].endswith(": AttributeError: no such setting")
    assert checks["context"]["status"] == "ok"


def test_a_config_need_not_know_of_padding() -> None:
    tokenizer = SimpleNamespace(pad_token_id=3, eos_token_id=4, pad_token="p")  # noqa: S106
    config = SimpleNamespace(get_text_config=lambda: object())
    for kind, status in (("policy", "ok"), ("reward model", "fault")):
        directory: Any = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(config=config), kind=kind)
        assert [check.status for check in of_files._pad_token(directory)] == [status]
