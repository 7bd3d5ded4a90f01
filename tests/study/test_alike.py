"""Seeds of a study are made of the same functions and models, or neither pooled nor gone on with."""

import shutil
from dataclasses import replace
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
from preftune.runs.sources import dataset_of
from preftune.study import alike, launch
from preftune.study.alike import stage_keys
from preftune.study.design import load_design, save_design
from preftune.study.kept import keep, kept_files
from preftune.study.launch import run_study
from preftune.study.places import facts_file, numbers_in
from preftune.study.pool import pool
from preftune.study.seed import run_seed
from preftune.study.tasks import Task
from preftune.sums import write_sealed

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the study


def characters(prompt: str, response: str) -> float:
    return float(len(response))


def keys(tmp_path: Path, seed: int, precision: str = "float32") -> dict[str, str]:
    settings = [f"seed={seed}", f"precision={precision}", "data.pairs=40"]
    config = load_recipe("tiny", [*settings, f"stage.ppo.reward_functions={__name__}:characters"]).config
    dataset = dataset_of(config.data, seed)
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
    with pytest.raises(DataError, match=r"seed\.json: made with another .* than seed 3") as caught:
        pool(records, design)
    assert caught.value.hint == "leave that seed out, or make a study of each kind"
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
    words = "was made with another reward function, base model or judge than there is now"
    with pytest.raises(DataError, match=rf"seed-4/study {words} \(stages: ceiling\)"):
        run_seed(Task(out=mixed, seed=5))
    kept = tmp_path / "kept"
    keep(two_seeds, kept, load_design(two_seeds), 3)
    with pytest.raises(AssertionError, match="trained"):
        run_study(wanted(), tmp_path / "a", seeds=2, first_seed=3, reports=False, keep=kept)
    with_another_function(kept / "seed-3" / "seed.json")
    with pytest.raises(DataError, match=f"kept/seed-3 {words}"):
        run_study(wanted(), tmp_path / "b", seeds=2, first_seed=3, reports=False, keep=kept)


def test_kept_seeds_of_another_design_are_no_seeds_of_this_one(
    two_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may lie in the same directory; and that of a mirror is read once, given twice."""
    from preftune.runs import runner

    design, mirror = load_design(two_seeds), tmp_path / "mirror"
    kept = numbers_in(mirror)
    for seed in SEEDS:
        keep(two_seeds, kept, design, seed)
    assert list(kept_files(kept, design)) == [kept / f"seed-{seed}" / "seed.json" for seed in SEEDS]
    assert list(kept_files(kept, replace(design, replies=3))) == []
    other = with_another_function(kept / "seed-3" / "seed.json")
    write_sealed(other, read_json(other) | {"key": "of another design"})
    monkeypatch.setattr(runner, "train_stages", trained)
    directories: list[Path] = []
    usual = alike.kept_files
    monkeypatch.setattr(alike, "kept_files", lambda *given: directories.append(given[0]) or usual(*given))
    save_design(design, mirror)
    with pytest.raises(AssertionError, match="trained"):
        run_seed(Task(out=tmp_path / "out", seed=5, mirror=mirror, keep=kept))
    assert directories == [kept]


def test_a_seed_in_a_process_of_its_own_is_told_of_kept_ones(
    two_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[list[str]] = []
    monkeypatch.setattr(launch, "carry_out", lambda tasks, *_, **__: words.extend(t.words for t in tasks))
    nowhere = launch.Placement()
    launch._run(
        tmp_path, [5], load_design(two_seeds), 2, False, nowhere, Console(quiet=True), tmp_path / "kept"
    )
    ((*_, option, directory),) = words
    assert (option, directory) == ("--keep", str(tmp_path / "kept"))
