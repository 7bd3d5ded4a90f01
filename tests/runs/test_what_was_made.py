"""Keys by content, reports by what they were made of, stages by the models that they were made from."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import preftune
import prose
from made_once import drawing
from preftune.cli import main
from preftune.models.locate import Source, fingerprint, surroundings
from preftune.report.plots import figures
from preftune.rundir import RunDir, read_json, write_json
from preftune.runs.reopen import reopen
from tiny import without_sums

FUNCTION = "stage.grpo.reward_functions=mended:f"
GRPO = (
    *("model.scratch.steps=2", "data.pairs=60", "stage.sft.rows=16", "stage.grpo.steps=2"),
    *("stage.grpo.reward_model=none", "stage.grpo.max_new_tokens=4", FUNCTION),
)


def test_a_report_is_made_again_when_what_it_shows_has_changed(
    copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    draw = drawing("preftune.report.plots.figures")
    monkeypatch.setattr(figures, "draw", lambda run: drawn or drawn.update(draw(run)) or drawn)
    analysis = copy.analysis_text.read_text()
    for file in (copy.report_page, copy.figures / "reward_kl.svg"):  # killed between two files
        file.unlink()
        preftune.run("tiny", out=str(copy.path))
        assert file.is_file()
    assert copy.analysis_text.read_text() == analysis
    record = read_json(without_sums(copy).evaluation("policy_ppo"))
    write_json(copy.evaluation("policy_ppo"), {**record, "label": "Another name"})
    preftune.run("tiny", out=str(copy.path))  # evaluated before preftune kept sums, report not built since
    assert "Another name" in copy.analysis_text.read_text()


def test_memory_is_given_back_after_what_was_made(copy: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[None] = []
    monkeypatch.setattr("preftune.runs.runner.give_back_memory", lambda: given.append(None))
    for directory in (copy.models / "policy_dpo", copy.stage_dir("dpo")):
        shutil.rmtree(directory)
    for _ in range(2):
        assert main(["train", "tiny", "dpo", f"out={copy.path}"]) == 0
        assert len(given) == 1  # after dpo; its parents, and all the second time, were there


def test_a_stage_can_be_made_anew_bit_for_bit(copy: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """What the hint says: remove both directories of the stage, and run the same command."""
    model = copy.models / "policy_sft" / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-4] + b"abcd")
    for words in (
        ["run", "tiny", f"out={copy.path}"],
        ["sample", str(copy.path)],
        ["evaluate", str(copy.path)],
    ):
        assert main(words) == 65
        said = capsys.readouterr().err
        assert f"{model} is not what was written" in said
        assert f"remove {model.parent} and {copy.stage_dir('sft')}" in said
    shutil.rmtree(model.parent)
    assert main(["evaluate", str(copy.path)]) == 65
    shutil.rmtree(copy.stage_dir("sft"))
    assert main(["run", "tiny", f"out={copy.path}"]) == 0
    assert model.read_bytes() == whole
    said = capsys.readouterr().out
    assert "ppo          already finished" in said
    assert "evaluation   already finished" in said


def test_a_child_of_another_model_is_no_child(copy: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """A parent that was made anew with other bits (another machine): said, not passed over."""
    record = read_json(copy.stage_json("sft"))
    for entry in record["files"].values():
        entry["sha256"] = "0" * 64
    del record["record_sha256"]
    weights = copy.models / "policy_sft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    from preftune.sums import sums, write_sealed

    files = [copy.path / name for name in record["files"]]
    write_sealed(copy.stage_json("sft"), {**record, "files": sums(copy, files)})
    assert main(["run", "tiny", f"out={copy.path}"]) == 78
    assert "was made from another model of sft" in capsys.readouterr().err


def test_a_run_from_before_sums_opens_and_says_so_once(
    copy: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    without_sums(copy)
    assert main(["run", "tiny", f"out={copy.path}"]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "not verified" in line)
    prose.compare("runs/what_was_made: a run from before sums", line.replace(str(copy.path), "RUN"))
    assert "sft          already finished" in said
    metrics = copy.metrics("ppo")
    metrics.write_bytes(metrics.read_bytes()[:-20])
    assert main(["report", str(copy.path)]) == 65
    assert "metrics.jsonl:3" in capsys.readouterr().err


def test_what_lies_beside_the_weights_of_a_base_decides_too(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_run.models / "base", tmp_path / "base"))
    words = ["train", "tiny", "sft", f"model.base={base}", "model.scratch=none", f"out={tmp_path / 'run'}"]
    assert main(words) == 0
    (base / "README.md").write_text("another card")
    assert main(words) == 0
    before = surroundings(Source(str(base)))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        old = (base / name).read_bytes() if (base / name).exists() else None
        (base / name).write_bytes((old or b"") + b" ")
        assert surroundings(Source(str(base))) != before, name
        capsys.readouterr()
        assert main(words) == 78, name
        assert "was made with other settings" in capsys.readouterr().err
        (base / name).unlink() if old is None else (base / name).write_bytes(old)


def test_a_run_on_a_directory_from_before_keeps_its_key(tiny_run: RunDir, tmp_path: Path) -> None:
    from preftune.sums import sum_of

    base = Path(shutil.copytree(tiny_run.models / "base", tmp_path / "base"))
    words = ["train", "tiny", "sft", f"model.base={base}", "model.scratch=none", f"out={tmp_path / 'run'}"]
    assert main(words) == 0
    run = RunDir(tmp_path / "run")
    record = read_json(without_sums(run).stage_json("sft"))
    record["inputs"]["parents"]["base"] = sum_of({"sha256": fingerprint(Source(str(base)))})
    write_json(run.stage_json("sft"), {**record, "key": sum_of(record["inputs"])})
    assert main(words) == 0


@pytest.mark.usefixtures("small_data")
def test_after_a_function_is_mended_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, words = tmp_path / "mended.py", ["train", "tiny", "grpo", *GRPO, f"out={tmp_path / 'run'}"]
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> None:
        import importlib
        import sys

        mine.write_text(f"def f(prompt, response):\n    {text}\n")
        sys.modules.pop("mended", None)
        importlib.invalidate_caches()

    write("exit()")
    assert main(words) == 65
    assert "mended:f, row" in capsys.readouterr().err
    write("return 1.0 * len(response)  # mended")
    assert main(words) == 0
    write("return 2.0  # and again")
    assert main(words) == 78
    assert f"reward function mended:f: {mine} has changed since" in capsys.readouterr().err


@pytest.mark.usefixtures("small_data")
def test_without_a_reward_model_being_cut_off_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from preftune.config import load_recipe

    def rule(*more: str) -> float | None:
        stage = load_recipe("tiny", ["stage.grpo.reward_functions=mended:f", *more]).config.stage["grpo"]
        return stage.missing_eos_score  # type: ignore[union-attr]

    assert rule() == -1
    assert rule("stage.grpo.reward_model=none") is None
    assert rule("stage.grpo.reward_model=none", "stage.grpo.missing_eos_score=-3") == -3
    (tmp_path / "low.py").write_text("def f(prompt, response):\n    return -7.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [word.replace("mended:f", "low:f") for word in GRPO]
    assert (
        main(["train", "tiny", "grpo", *words, "stage.grpo.missing_eos_score=-1", f"out={tmp_path / 'r'}"])
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("missing_eos_score = -1 (down to -7.5)") == 1


def test_what_a_stage_depends_on_is_looked_up_once(tiny_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge from elsewhere is hashed for it, which takes a while."""
    session = reopen(tiny_run.path, write=False)
    before = {name: session.stage(name).key for name in session.config.stage}
    monkeypatch.setattr(type(session), "_inputs", lambda *_: pytest.fail("looked up again"))
    assert {name: session.stage(name).key for name in session.config.stage} == before
