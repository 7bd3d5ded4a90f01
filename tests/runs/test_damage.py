"""A finished run that is damaged: the next command that reads the file names it, or makes it anew."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from made_once import figures
from preftune.audit import audit_directory
from preftune.cli import main
from preftune.errors import DataError
from preftune.rundir import RunDir
from preftune.runs.standalone import load_reward_model
from sweeps import every

MODEL = "models/policy_sft"
READ_BY_RUN = [
    *(f"{MODEL}/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "preftune.json")),
    *(f"{MODEL}/{name}" for name in ("generation_config.json", "tokenizer_config.json", "README.md")),
    *(f"models/reward_model/{name}" for name in ("model.safetensors", "preftune.json", "reward_head.bin")),
    *("stages/ppo/metrics.jsonl", "stages/ppo/ledger.jsonl", "stages/ppo/stage.json"),
    *("evaluation/policy_ppo.json", "evaluation/comparisons.jsonl", "evaluation/reward_model.json"),
    *("samples/policy_ppo_samples.jsonl", "analysis/reward_model_mistakes.jsonl"),
    *("stages/evaluation/stage.json", "config.toml", "data.json", "origins.json", "run.json"),
    *("ANALYSIS.md", "report.html", "figures/reward_kl.svg", ".report.json", ".preftune"),
]
SHOWN = ("ANALYSIS.md", "report.html", "figures/reward_kl.svg", ".report.json")
READ_BY_REPORT = [
    *("stages/ppo/metrics.jsonl", "stages/ppo/ledger.jsonl", "stages/ppo/stage.json"),
    *("evaluation/policy_ppo.json", "evaluation/comparisons.jsonl", "evaluation/reward_model.json"),
    *("samples/policy_ppo_samples.jsonl", "analysis/reward_model_mistakes.jsonl"),
    *("stages/evaluation/stage.json", "config.toml", "data.json", "origins.json", "run.json"),
]


def flip(file: Path) -> None:
    """One bit, that keeps text text: the lowest of a letter or digit in the middle, or of a weight."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    text = file.suffix not in (".safetensors", ".bin")
    at = next(i for i in range(middle, len(content)) if not text or chr(content[i]).isalnum())
    content[at] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(file: Path) -> None:
    file.unlink()


def wrong_shape(file: Path) -> None:
    file.write_text("[]\n")


def number(file: Path) -> None:
    """What the issue did to std: a number of four times its size, well-formed."""
    file.write_text(re.sub(r"\d", lambda match: str((int(match[0]) + 4) % 10), file.read_text(), count=3))


def link(file: Path) -> None:
    away = file.parent.parent / f"away-{file.name}"
    away.write_bytes(file.read_bytes() + b" ")
    file.unlink()
    file.symlink_to(away)


def another(file: Path) -> None:
    """The same file of another model, stage or policy of the run, or one of another size."""
    twin = Path(str(file).replace("policy_sft", "policy_dpo").replace("ppo", "grpo"))
    file.write_bytes(twin.read_bytes() if twin != file else b"x" + file.read_bytes())


def damages(files: list[str]) -> Sequence[tuple[str, Callable[[Path], None]]]:
    """Every file loses a bit and one of the other ways in turn, which over all files meet every kind."""
    kinds = [cut, delete, link, another]
    found = [(file, kind) for i, file in enumerate(files) for kind in (flip, kinds[i % len(kinds)])]
    found += [(file, wrong_shape) for file in files if file.endswith((".json", ".preftune"))]
    found += [(file, number) for file in files if file.endswith(("preftune.json", "policy_ppo.json"))]
    record = "stages/ppo/stage.json"
    found += [(record, another)] if (record, another) not in found else []
    chosen = list(every(7, found))  # each takes seconds
    last = {kind: (file, kind) for file, kind in found}
    return chosen + [last[kind] for kind in last if kind not in {kind for _, kind in chosen}]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    return said.out + said.err


@pytest.mark.parametrize(("name", "damage"), damages(READ_BY_RUN))
def test_run_names_a_damaged_file_or_makes_it_anew(
    name: str,
    damage: Callable[[Path], None],
    copy: RunDir,
    tiny_run: RunDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copy.path / name)
    with figures(drawn=name in SHOWN):  # which are drawn anew after every evaluation
        code = main(["run", "tiny", f"out={copy.path}"])
    said = told(capsys)
    assert "internal error" not in said
    if code:
        assert Path(name).name in said
        assert code in (65, 78)
        return
    assert not (copy.path / name).is_symlink()
    if "stage.json" not in name and not name.startswith("."):
        same_but_for_time(copy.path / name, tiny_run.path / name)


def same_but_for_time(made: Path, before: Path) -> None:
    """The report says how long the evaluation took, which may have been made again."""
    if made.name in ("ANALYSIS.md", "report.html") or made.suffix == ".svg":
        assert abs(made.stat().st_size - before.stat().st_size) < 200
    else:
        text = before.read_text().replace(str(before.parent), str(made.parent))
        assert made.read_text() == text or made.name in ("run.json", "origins.json")


@pytest.mark.parametrize(("name", "damage"), damages(READ_BY_REPORT))
def test_a_report_is_not_made_of_damaged_files(
    name: str, damage: Callable[[Path], None], copy: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    if (name, damage) in [("stages/evaluation/stage.json", delete), ("stages/ppo/stage.json", delete)]:
        pytest.skip("a part without a record is not finished, and the report says so")
    damage(copy.path / name)
    assert main(["report", str(copy.path)]) in (65, 78)
    said = told(capsys)
    assert Path(name).name in said
    assert "internal error" not in said


def test_whoever_loads_a_model_of_a_run_learns_of_one_flipped_bit(copy: RunDir) -> None:
    weights = copy.models / "reward_model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors is not what was written"):
        load_reward_model(weights.parent)
    (check,) = audit_directory(weights.parent)["checks"]
    assert "model.safetensors is not what was written" in check["found"]
