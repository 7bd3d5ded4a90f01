"""A whole run over hostile data, with secrets in the environment: what it leaves behind and what it says."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from patience import PATIENCE
from preftune.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
SECRETS = {
    "HF_TOKEN": "hf_" + "Qz7" * 11,
    "WANDB_API_KEY": "5e1f" * 10,
    "OPENAI_API_KEY": "sk-proj-" + "Wv9x" * 8,
    "DB_PASSWORD": "correct-horse-battery",
    "HTTPS_PROXY": "http://user:Tr0ub4dor@127.0.0.1:9",
    "HF_ENDPOINT": "http://user:Xk9secretpw@127.0.0.1:9",
}
SAID = re.compile("|".join(["Qz7Qz7", "5e1f5e1f", "Wv9xWv9x", "horse-battery", "Tr0ub4dor", "Xk9secretpw"]))
OTHER = {"PYTHONHASHSEED": "7", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EVIL = "\x1b]52;c;aGk=\x07 \u202e <script>alert(1)</script> ``` \n---\nlicense: mit\n---\n [x](javascript:y)"
FOLDER = "`evil` \x1b[31m <b>x|y"
SMALL = [
    *("model.scratch.vocab_size=300", "model.scratch.steps=2", "model.scratch.batch_size=4"),
    *("data.max_prompt_length=44", "data.max_response_length=40", "data.on_bad_row=skip"),
    *("stage.sft.rows=8", "stage.rm.rows=8", "stage.ppo.steps=1", "stage.grpo=none", "stage.dpo=none"),
    *("evaluation.prompts=4", "evaluation.samples=4", "evaluation.resamples=50"),
]


@dataclass(frozen=True)
class Done:
    out: Path
    console: str

    def texts(self) -> Iterator[tuple[Path, str]]:
        for file in sorted(self.out.rglob("*")):
            if file.is_file() and file.suffix not in (".safetensors", ".bin"):
                yield file, file.read_bytes().decode("utf-8")


def write_data(root: Path) -> Path:
    folder = root / "donn\u00e9es" / FOLDER
    folder.mkdir(parents=True)
    lines = []
    for i in range(60):
        prompt = f"\n\nHuman: {i} {EVIL}\n\nAssistant:"
        row = {"chosen": f"{prompt} Yes {EVIL} {i}", "rejected": f"{prompt} No {EVIL}", EVIL: 1}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join([*lines, '{"chosen": "\\ud800 \x1b"}']), encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("hostile")
    data, out = write_data(root), root / "run"
    environment = {**os.environ, **SECRETS, **OTHER, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    words = ["run", "tiny", f"data.name={data}", "--out", str(out), *SMALL]
    command = [sys.executable, "-m", "preftune", *words]
    ran = subprocess.run(
        command, env=environment, capture_output=True, timeout=4 * PATIENCE, check=False, cwd=data
    )
    said = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == 0, said[-2000:]
    return Done(out, said)


def test_no_secret_is_written_or_said(done: Done) -> None:
    assert SAID.search(" ".join(SECRETS.values()))
    assert not SAID.search(done.console)
    for file, text in done.texts():
        assert not SAID.search(text), file


def test_nothing_that_acts_on_a_terminal_is_written_or_said(done: Done) -> None:
    assert not ACTS.search(done.console)
    for file, text in done.texts():
        if file.suffix in (".md", ".html", ".svg", ".log", ".toml"):
            assert not ACTS.search(text), file


def test_model_cards_keep_their_metadata(done: Done) -> None:
    cards = sorted(done.out.glob("models/*/README.md"))
    assert len(cards) == 4
    for card in cards:
        metadata = ModelCard.load(card).data.to_dict()
        assert metadata["library_name"] == "transformers"
        assert "license" not in metadata
        assert "<script" not in card.read_text()


def test_the_page_holds_text_not_elements(done: Done) -> None:
    page = (done.out / "report.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<b>x" not in page


def test_sampled_text_is_cleaned_too(
    done: Done, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sample", str(done.out), "--policy", "base", "--prompt", f"Hi {EVIL}"]) == 0
    shown = capsys.readouterr().out
    assert "\u27e8U+001B\u27e9" in shown
    assert not ACTS.search(shown)


def test_a_library_error_that_holds_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"401 for http://user:Xk9secretpw@hub/ with {SECRETS['HF_TOKEN']} \x1b[31m")

    monkeypatch.setattr("preftune.api.run_recipe", fail)
    assert main(["run", "tiny", "--debug"]) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "401 for http://[redacted]@hub/" in shown
    assert not SAID.search(shown)
    assert not ACTS.search(shown)


def test_weights_do_not_depend_on_hash_seed_locale_time_zone_or_directory(done: Done, tmp_path: Path) -> None:
    """Those of the process elsewhere, and those made here with the hash seed that this process drew."""
    (data,) = (done.out.parent).glob("donn*")
    assert main(["train", "tiny", "rm", f"data.name={data}", "--out", str(tmp_path / "run"), *SMALL]) == 0
    for model in ("policy_sft", "reward_model"):
        weights = f"models/{model}/model.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (done.out / weights).read_bytes()
