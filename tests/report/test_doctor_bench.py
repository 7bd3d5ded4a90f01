"""The doctor's benchmark plants every kind there is, and its page shows what it wrote."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from documented import ROOT
from preftune.config import load_recipe
from preftune.report.doctor.diagnose import PATHOLOGIES
from preftune.rundir import read_json


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = ROOT / "benchmarks" / "doctor" / "bench.py"
    spec = importlib.util.spec_from_file_location("doctor_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor_bench"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_kind_is_planted_once(bench: ModuleType) -> None:
    judges = [fault for faults in bench.JUDGES.values() for fault in faults]
    kinds = [fault.kind for fault in (*bench.TRAINING, *bench.POLICIES, *judges)]
    assert sorted(kinds) == sorted(pathology.kind for pathology in PATHOLOGIES)


def test_what_is_planted_are_settings_that_there_are(bench: ModuleType) -> None:
    healthy = {"ppo": bench.PPO, "grpo": bench.GRPO, "dpo": bench.DPO}
    for settings in ({f.stage: f.settings for f in (*bench.TRAINING, *bench.POLICIES)}, healthy):
        config = load_recipe("tiny", [*bench.COMMON, *bench.stages(settings)]).config
        assert settings.keys() <= config.stage.keys()


def test_recall_and_false_alarms_are_counted_with_wilsons_interval(bench: ModuleType) -> None:
    runs = {
        "training-0": {"planted": {"repetition": ["seen"], "broken replies": []}},
        "training-1": {"planted": {"repetition": ["seen"]}},
        "healthy-0": {"alarms": []},
        "healthy-1": {"alarms": [["repetition", "ppo", "seen"]]},
    }
    found = bench.summary(runs)
    assert {kind: (share["found"], share["n"]) for kind, share in found["recall"].items()} == {
        "repetition": (2, 2),
        "broken replies": (0, 1),
    }
    # Wilson 1927: for 2 of 2 the lower end is n / (n + z²) = 2 / (2 + 3.8415)
    assert found["recall"]["repetition"]["interval"] == pytest.approx([0.3424, 1.0], abs=1e-4)
    assert (found["false_alarms"]["found"], found["false_alarms"]["n"]) == (1, 2)


def test_the_page_shows_what_was_measured(bench: ModuleType) -> None:
    results = Path(bench.RESULTS) / "reported.json"
    if not results.is_file():
        pytest.skip("nothing is published yet")
    found = read_json(results)
    assert bench.table(found) in bench.PAGE.read_text(encoding="utf-8")
    assert found["recall"] == bench.summary(found["runs"])["recall"]
