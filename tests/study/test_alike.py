"""Seeds of a study are made of the same functions and models, or neither pooled nor gone on with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from study_helpers import SEEDS, wanted

from preftune.config import load_recipe
from preftune.errors import DataError
from preftune.rundir import RunDir, read_json
from preftune.runs import session as sessions
from preftune.runs.console import Console
from preftune.runs.session import Session
from preftune.runs.sources import load_dataset
from preftune.study import launch
from preftune.study.alike import stage_keys
from preftune.study.design import load_design
from preftune.study.kept import keep
from preftune.study.launch import run_study
from preftune.study.places import facts_file
from preftune.study.pool import pool
from preftune.study.seed import run_seed
from preftune.sums import write_sealed

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the study


def characters(prompt: str, response: str) -> float:
    return float(len(response))


def keys(tmp_path: Path, seed: int, precision: str = "float32") -> dict[str, str]:
    settings = [f"seed={seed}", f"precision={precision}", "data.pairs=40"]
    config = load_recipe("tiny", [*settings, f"stage.ppo.reward_functions={__name__}:characters"]).config
    dataset = load_dataset(config.data, seed)
    run = RunDir(tmp_path / f"seed-{seed}")
    return stage_keys(Session(config=config, dataset=dataset, run=run, console=Console()))


def test_stages_differ_by_their_functions_and_not_by_seed_or_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keys(tmp_path, 0)
    assert set(first) == {"base", "sft", "rm", "ppo", "grpo", "dpo"}
    assert keys(tmp_path, 1) == first
    assert keys(tmp_path, 0, "bf16") == first
    monkeypatch.setattr(sessions, "source_hashes", lambda terms: {terms: "edited"})
    edited = keys(tmp_path, 2)
    assert {name for name in first if edited[name] != first[name]} == {"ppo"}


def with_another_function(file: Path) -> Path:
    """A finished seed as if the ceiling's function had been another one then."""
    record = read_json(file)
    write_sealed(file, record | {"stages": record["stages"] | {"ceiling": "of another source"}})
    return file


@pytest.fixture
def mixed(two_seeds: Path, tmp_path: Path) -> Path:
    out = Path(shutil.copytree(two_seeds, tmp_path / "study"))
    with_another_function(facts_file(out, 4))
    return out


def test_seeds_made_of_different_things_are_not_pooled(two_seeds: Path, mixed: Path) -> None:
    design, records = load_design(mixed), {seed: facts_file(mixed, seed) for seed in SEEDS}
    assert read_json(facts_file(two_seeds, 3))["stages"] == read_json(facts_file(two_seeds, 4))["stages"]
    with pytest.raises(DataError, match=r"seed-4/study/seed\.json: stages made of other reward functions"):
        pool(records, design)
    old = read_json(records[4])
    write_sealed(records[4], {k: v for k, v in old.items() if k != "stages"})  # of before this was recorded
    assert pool(records, design)["seeds"]


def trained(*_: Any, **__: Any) -> None:
    raise AssertionError("a stage was trained")


def test_a_study_does_not_go_on_beside_a_seed_that_was_made_of_something_else(
    two_seeds: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preftune.runs import runner

    monkeypatch.setattr(runner, "train_stages", trained)
    with pytest.raises(DataError, match=r"seed-4/study: stages made of other .* than they are now \(ceiling"):
        run_seed(mixed, 5)
    kept = tmp_path / "kept"
    keep(two_seeds, kept, load_design(two_seeds), 3)
    with pytest.raises(AssertionError, match="trained"):
        run_study(wanted(), tmp_path / "a", seeds=2, first_seed=3, reports=False, keep=kept)
    with_another_function(kept / "seed-3" / "seed.json")
    with pytest.raises(DataError, match=r"kept/seed-3: stages made of other"):
        run_study(wanted(), tmp_path / "b", seeds=2, first_seed=3, reports=False, keep=kept)


def test_a_seed_in_a_process_of_its_own_is_told_of_kept_ones(
    two_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[list[str]] = []
    monkeypatch.setattr(launch, "carry_out", lambda tasks, *_, **__: words.extend(t.words for t in tasks))
    nowhere = launch.Where()
    launch._run(
        tmp_path, [5], load_design(two_seeds), 2, False, nowhere, Console(quiet=True), tmp_path / "kept"
    )
    ((*_, option, directory),) = words
    assert (option, directory) == ("--keep", str(tmp_path / "kept"))
