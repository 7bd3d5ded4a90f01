"""An evaluation that is killed goes on where it was: what was measured is not measured again, and nothing in
the results tells that it was interrupted.
"""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from faultlab import Lab

from gloo import begun
from made_once import figures
from preftune.rundir import RunDir, read_json
from preftune.verify import attempts

pytestmark = pytest.mark.xdist_group("forked")

SETTINGS = [
    *("stage.ppo=none", "stage.grpo=none", "evaluation.prompts=4", "evaluation.max_new_tokens=6"),
    *("evaluation.pool=4", "evaluation.best_of=2", "evaluation.resamples=20"),
]
PARTS = ["audit_rm", "policy_sft", "base", "policy_dpo", "chosen", "pool"]  # in the order they are made


def without_drawing(words: list[str], log: str, fault: str) -> None:
    """`preftune WORDS...` in a process of its own, with a report that has no figures."""
    with figures(drawn=False):
        attempts._command(words, log, fault)


def evaluated(lab: Lab, out: Path, fault: str = "") -> tuple[int, str]:
    """The exit code of `preftune run` on finished stages, and what it said."""
    before = lab.log.stat().st_size
    trained = [word for word in lab.words("dpo", out)[3:] if not word.startswith(("stage.ppo", "stage.grpo"))]
    process = begun(without_drawing, ["run", "tiny", *trained, *SETTINGS], str(lab.log), fault)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, lab.log.read_bytes()[before:].decode()


def results(run: RunDir) -> dict[str, Any]:
    """All that an evaluation writes, but for its times."""
    folders = (run.path / folder for folder in ("evaluation", "samples", "analysis"))
    files = [path for folder in folders for path in folder.glob("*") if path.name != "setup.md"]
    found: dict[str, Any] = {str(path.relative_to(run.path)): path.read_bytes() for path in files}
    record = read_json(run.stage_json("evaluation"))
    varies = ("seconds", "peak_memory_mb", "record_sha256")
    return found | {"record": {k: v for k, v in record.items() if k not in varies}}


def parts(run: RunDir) -> list[Path]:
    return sorted((run.stage_dir("evaluation") / "parts").glob("*.json"))


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with DPO trained, evaluated in one go. Copy it."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(lab.whole("dpo").path, out)
    code, said = evaluated(lab, out)
    assert code == 0, said
    assert not parts(RunDir(out))
    return RunDir(out)


@pytest.fixture
def unmeasured(whole: RunDir, out: Path) -> RunDir:
    """The same run before its evaluation."""
    run = RunDir(shutil.copytree(whole.path, out))
    for folder in ("evaluation", "samples", "analysis", "stages/evaluation"):
        shutil.rmtree(run.path / folder)
    return run


def test_a_killed_evaluation_goes_on_where_it_was(lab: Lab, whole: RunDir, unmeasured: RunDir) -> None:
    """Killed as the third part is to be kept, and again while the next one is sampled."""
    code, said = evaluated(lab, unmeasured.path, "evaluation.part@hit=3:kill")
    assert code == -signal.SIGKILL, said
    assert {path.stem for path in parts(unmeasured)} == set(PARTS[:2])
    written = {path: path.stat().st_mtime_ns for path in parts(unmeasured)}
    code, said = evaluated(lab, unmeasured.path, "rollout.token@hit=9:kill")
    assert code == -signal.SIGKILL, said
    assert {path.stem for path in parts(unmeasured)} == set(PARTS[:3])
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    code, said = evaluated(lab, unmeasured.path)
    assert code == 0, said
    assert [name for name in PARTS if f"evaluation of {name}: already measured" in said] == PARTS[:3]
    assert results(unmeasured) == results(whole)
    assert not parts(unmeasured)
