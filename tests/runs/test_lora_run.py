"""Stages that train adapters, whole: models, adapters beside them, and an adapter as the base of a run."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import preftune
from made_once import made_once
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.models.load import load_causal_lm, load_tokenizer
from preftune.models.locate import locate
from preftune.rundir import RunDir, read_json
from tiny import same_weights, state

LORA = ("model.trainable=lora", "model.lora.rank=4", "model.lora.alpha=8", "stage.grpo=none")
SMALL = ("model.scratch.steps=3", "stage.sft.rows=64", "stage.rm.rows=64", "stage.dpo.rows=64")
MODELS = ("policy_sft", "reward_model", "policy_ppo", "policy_dpo")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, few_pairs: None) -> RunDir:
    """SFT, reward model, PPO and DPO. Read only."""

    def make(out: Path) -> None:
        for train in (preftune.ppo_train, preftune.dpo_train):
            train("tiny", *LORA, *SMALL, out=str(out / "run"))

    return RunDir(made_once(tmp_path_factory, "lora", make) / "run")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_whole_and_its_adapter_lies_beside_it(name: str, lora_run: RunDir) -> None:
    """peft's own reading of the adapter, on the model that it names, gives the model."""
    directory = lora_run.path / "models" / name
    kind = AutoModelForSequenceClassification if name == "reward_model" else AutoModelForCausalLM
    whole = kind.from_pretrained(directory).eval()
    adapter = read_json(directory / "adapter" / "adapter_config.json")
    base = (directory / "adapter" / adapter["base_model_name_or_path"]).resolve()
    assert base.name == ("base" if name == "policy_sft" else "policy_sft")
    torch.manual_seed(0)  # of the reward model's head, which the adapter brings
    below = kind.from_pretrained(base, **({"num_labels": 1} if name == "reward_model" else {})).eval()
    below.config.pad_token_id = whole.config.pad_token_id
    fresh = state(below)
    theirs = peft.PeftModel.from_pretrained(below, directory / "adapter").eval()
    ids = torch.arange(20, 60).view(4, 10)
    assert torch.allclose(theirs(ids).logits, whole(ids).logits, atol=1e-4)
    assert not any("lora" in key for key in state(whole))
    same = {key for key, weight in state(whole).items() if torch.equal(weight, fresh[key])}
    frozen = {key for key in fresh if "ln_" in key or key.endswith((".bias", "wte.weight", "wpe.weight"))}
    if name == "reward_model":  # it has a pad token of its own
        frozen.remove("transformer.wte.weight")
    assert frozen <= same
    assert not same - frozen - {"transformer.wte.weight"}


def test_what_was_trained_is_in_the_key(lora_run: RunDir) -> None:
    inputs = read_json(lora_run.stage_json("dpo"))["inputs"]
    assert inputs["trainable"] == "lora"
    assert inputs["lora"] == {"rank": 4, "alpha": 8.0}
    with pytest.raises(ConfigError, match="lora"):
        preftune.dpo_train("tiny", *LORA, *SMALL, "model.lora.rank=8", out=str(lora_run.path))


def test_an_adapter_loads_as_a_base(
    lora_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged into the model that it names, once; with the same bits as the model beside it."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    directory = lora_run.path / "models" / "policy_dpo"
    source = locate(str(directory / "adapter"))
    assert same_weights(state(load_causal_lm(source)), state(AutoModelForCausalLM.from_pretrained(directory)))
    assert len(load_tokenizer(source)) > 0
    files = {file: file.stat().st_mtime_ns for file in Path(source.path).iterdir()}
    assert locate(str(directory / "adapter")) == source
    assert files == {file: file.stat().st_mtime_ns for file in Path(source.path).iterdir()}
    with pytest.raises(DataError, match="modules_to_save"):
        locate(str(lora_run.path / "models" / "reward_model" / "adapter"))


def test_a_finished_stage_stands(lora_run: RunDir) -> None:
    """Its files are known by their sums, those of the adapter too."""
    assert (
        "models/policy_dpo/adapter/adapter_model.safetensors"
        in read_json(lora_run.stage_json("dpo"))["files"]
    )
    files = [file for file in (lora_run.path / "models").rglob("*") if file.is_file()]
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    preftune.dpo_train("tiny", *LORA, *SMALL, out=str(lora_run.path))
    assert before == {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (lambda path: _edit(path, base_model_name_or_path=None), "names no base model"),
    "an adapter as base": (lambda path: _edit(path, base_model_name_or_path="."), "is an adapter, too"),
    "code beside it": (lambda path: (path / "evil.py").write_text("raise SystemExit"), "Python code"),
    "weights cut": (lambda path: os.truncate(path / "adapter_model.safetensors", 3000), "cannot load"),
    "no weights": (
        lambda path: (path / "adapter_model.safetensors").rename(path / "a.bin"),
        "holds an adapter",
    ),
    "config beside it": (lambda path: (path / "config.json").write_text("{}"), "holds an adapter"),
    "base elsewhere": (lambda path: _edit(path, base_model_name_or_path="/none"), "no such directory"),
}


def _edit(path: Path, **values: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | values))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_odd_adapter_is_an_error_for_people(
    name: str, lora_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copytree(lora_run.path / "models" / "policy_dpo" / "adapter", tmp_path / "adapter"))
    _edit(path, base_model_name_or_path=str(lora_run.path / "models" / "policy_sft"))
    change, words = DAMAGE[name]
    change(path)
    with pytest.raises((DataError, InputMissing), match=words):
        locate(str(path))
    assert not (tmp_path / "cache").exists()
