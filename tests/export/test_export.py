"""`export`: the commands name the model as the harnesses read it, GGUF comes from a converter, and nothing is
sent without a yes.
"""

import io
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError

from preftune.cli import main
from preftune.rundir import RunDir, write_text
from preftune.sums import sums, write_sealed

CONFIG = """name = "small"
seed = 0
[model]
base = "{base}"
[data]
name = "world"
form = "{form}"
[stage.sft]
algorithm = "sft"
[stage.rm]
algorithm = "reward"
[stage.dpo]
algorithm = "dpo"
"""
CONVERTER = """import sys
words = sys.argv[1:]
if "broken" in words[0]: sys.exit("no such architecture")
open(words[words.index("--outfile") + 1], "w").write("GGUF " + " ".join(words[-2:]))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose models are a few small files."""
    made = RunDir(tmp_path / "my run")
    write_text(made.config, CONFIG.format(base="/models/there", form="transcript"))
    for name in ("policy_sft", "policy_dpo", "reward_model"):
        folder = made.models / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"0" * 2_000_000)
        (folder / "README.md").write_text("# A model\n")
        (folder / "config.json").write_text("{}")
        (folder / "reward_head.bin").write_bytes(b"pickle")
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"0")
        (folder / ".hidden.json").write_text("{}")
    return made


def said(run: RunDir, *words: str, code: int = 0, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", str(run.path), *words]) == code
    both = capsys.readouterr()
    return both.out + both.err


def test_a_policy_goes_to_lm_eval(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(run, "sft", capsys=capsys)
    (line,) = [line for line in out.splitlines() if line.startswith("lm_eval")]
    words = shlex.split(line)
    directory = (run.models / "policy_sft").resolve()
    assert words[words.index("--model_args") + 1] == f"pretrained={directory},dtype=float32"
    assert "--apply_chat_template" not in words
    assert "rewardbench" not in out


def test_a_chat_model_is_asked_in_its_template(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(run.config, CONFIG.format(base="/models/there", form="chat"))
    assert "--apply_chat_template" in said(run, "policy_sft", capsys=capsys)
    assert "--chat_template=raw" not in said(run, "rm", capsys=capsys)


def test_what_scores_goes_to_rewardbench(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy of DPO with its reference; a reward model as it is."""
    words = shlex.split(said(run, "reward_model", capsys=capsys).splitlines()[-1])
    assert words[:2] == ["rewardbench", f"--model={(run.models / 'reward_model').resolve()}"]
    assert "--chat_template=raw" in words
    words = shlex.split(said(run, "dpo", capsys=capsys).splitlines()[-1])
    assert f"--ref_model={(run.models / 'policy_sft').resolve()}" in words


def test_a_judge_by_averages_has_no_command_that_sums(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(run.config, CONFIG.format(base="/models/there", form="transcript") + "length_average = true\n")
    assert "rewardbench" not in said(run, "dpo", capsys=capsys)


@pytest.mark.parametrize(
    ("base", "reference"),
    [
        ("gpt2", "gpt2"),
        ("me/model", "me/model"),
        ("smollm2", None),
        ("/models/x.gguf", None),
        ("{here}", "{here}"),
    ],
)
def test_a_base_that_only_preftune_reads_is_no_reference(
    run: RunDir, tmp_path: Path, base: str, reference: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.format(base=base.format(here=tmp_path), form="transcript")
    write_text(run.config, text + 'init = "base"\n')
    words = shlex.split(said(run, "dpo", capsys=capsys).splitlines()[-1])
    named = [word for word in words if word.startswith("--ref_model=")]
    assert named == ([] if reference is None else [f"--ref_model={reference.format(here=tmp_path)}"])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["dpp"], 64, "did you mean dpo?"),
        (["rm", "--gguf", "x.gguf"], 64, "no GGUF form"),
        (["sft", "--gguf", "x.bin"], 64, "does not end in .gguf"),
        (["sft", "--gguf", "x.gguf", "--type", "q1"], 64, "one of: f32"),
        (["sft", "--gguf", "none/x.gguf"], 66, "no such directory"),
        (["sft", "--push", "me"], 64, "OWNER/NAME"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: RunDir, words: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in said(run, *words, code=code, capsys=capsys)


@pytest.mark.parametrize("member", ["sft", "rm/member-1"])
def test_a_model_that_is_not_what_was_written_is_refused(
    run: RunDir, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(
        run.config,
        CONFIG.format(base="/models/there", form="chat").replace('"reward"', '"reward"\nmembers = 2'),
    )
    for name in ("sft", "rm"):
        model = run.model_dir(name, trains_policy=name == "sft")
        for file in ("member-0/model.safetensors", "member-1/model.safetensors"):
            write_text(model / file, "weights")
        files = [file for file in model.rglob("*") if file.is_file()]
        write_sealed(run.stage_json(name), {"stage": name, "files": sums(run, files)})
    said(run, member, capsys=capsys)
    write_text(run.models / "policy_sft" / "config.json", "[]")
    write_text(run.models / "reward_model" / "member-1" / "model.safetensors", "others")
    assert "is not what was written" in said(run, member, code=65, capsys=capsys)


def test_gguf_without_a_converter_says_how_to_get_one(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    out = said(run, "sft", "--gguf", str(tmp_path / "x.gguf"), code=69, capsys=capsys)
    assert "LLAMA_CPP=" in out


def test_gguf_comes_whole_from_the_converter(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    target = tmp_path / "x.gguf"
    said(run, "sft", "--gguf", str(target), "--type", "q8_0", capsys=capsys)
    assert target.read_text() == "GGUF --outtype q8_0"
    broken = RunDir(shutil.copytree(run.path, tmp_path / "broken"))
    out = said(broken, "sft", "--gguf", str(tmp_path / "y.gguf"), code=74, capsys=capsys)
    assert "no such architecture" in out
    assert not list(tmp_path.glob("*y.gguf"))
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the hub."""
    calls = list[dict[str, Any]]()

    class Hub:
        def create_repo(self, name: str, **given: Any) -> None:
            calls.append({"made": name, **given})

        def repo_info(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(private=name != "me/public")

        def upload_folder(self, **given: Any) -> str:
            calls.append(given)
            return "https://hub.example/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return calls


@pytest.mark.parametrize("answer", ["", "\n", "no\n", "y\n"])
def test_nothing_is_sent_without_a_yes(
    run: RunDir,
    hub: list[dict[str, Any]],
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    out = said(run, "sft", "--push", "me/mine", capsys=capsys)
    assert "nothing was sent" in out
    assert hub == []


def test_what_was_listed_is_what_goes_up(
    run: RunDir,
    hub: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    out = said(run, "sft", "--push", "me/mine", capsys=capsys)
    files = ["README.md", "adapter/adapter_model.safetensors", "config.json", "model.safetensors"]
    made, sent = hub
    assert made == {"made": "me/mine", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["allow_patterns"]) == ("me/mine", files)
    assert "4 files, 2.0 MB" in out
    assert "stays here     reward_head.bin" in out
    assert "stays here     .hidden.json" in out


def test_a_card_with_a_token_does_not_go_up(
    run: RunDir, hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (run.models / "policy_sft" / "README.md").write_text("token: hf_" + "a" * 34)
    out = said(run, "sft", "--push", "me/mine", "--yes", code=64, capsys=capsys)
    assert "password or token" in out
    assert "hf_aaaa" not in out
    assert hub == []


def test_a_path_of_this_machine_is_pointed_out(
    run: RunDir, hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (run.models / "policy_sft" / "config.json").write_text(f'{{"_name_or_path": "{Path.home()}/x"}}')
    assert "config.json names a path" in said(
        run, "sft", "--push", "me/public", "--public", "--yes", capsys=capsys
    )
    assert hub[0]["private"] is False


def test_what_was_called_private_does_not_go_into_a_public_repository(
    run: RunDir, hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub ignores `private` of a repository that is there."""
    out = said(run, "sft", "--push", "me/public", "--yes", code=64, capsys=capsys)
    assert "is there already, and public" in out
    assert [call for call in hub if "made" not in call] == []
    said(run, "sft", "--push", "me/public", "--public", "--yes", capsys=capsys)
    assert len(hub) == 3


def test_what_was_called_public_does_not_go_into_a_private_repository(
    run: RunDir, hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(run, "sft", "--push", "me/mine", "--public", "--yes", code=64, capsys=capsys)
    assert "is there already, and private" in out
    assert [call for call in hub if "made" not in call] == []


@pytest.mark.parametrize(
    ("error", "text"),
    [(RuntimeError("no route"), "cannot reach the hub"), (HFValidationError("Repo id"), "refused")],
)
def test_whatever_the_client_raises_is_said(
    run: RunDir,
    hub: list[dict[str, Any]],
    error: Exception,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fails)
    assert text in said(run, "sft", "--push", "me/mine", "--yes", code=74, capsys=capsys)
