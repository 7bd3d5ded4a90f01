"""Numbers of finished seeds that lie in a directory of their own, and what stands beside gold in a study."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from study_helpers import wanted

from preftune.errors import DataError
from preftune.records.study import BestValues, PolicyValues, SeedRecord
from preftune.rundir import read_json
from preftune.study import kept, launch
from preftune.study.beside import as_text, other_judges, section
from preftune.study.design import load_design
from preftune.study.kept import keep, kept_file
from preftune.study.launch import run_study
from preftune.study.values import SeedValues

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the study


@pytest.fixture
def put_by(two_seeds: Path, tmp_path: Path) -> Path:
    design = load_design(two_seeds)
    for seed in (3, 4):
        keep(two_seeds, tmp_path / "kept", design, seed)
    return tmp_path / "kept"


def test_kept_seeds_make_the_same_study_without_a_run(
    two_seeds: Path, put_by: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[int]] = []
    monkeypatch.setattr(launch, "_run", lambda out, seeds, *_: runs.append(list(seeds)))
    (put_by.parent / "CONCLUSIONS.md").write_text("It learns little.\n")
    run_study(wanted(), tmp_path / "new", seeds=2, first_seed=3, reports=False, keep=put_by)
    assert runs == [[]]
    own, theirs = read_json(tmp_path / "new" / "study.json"), read_json(two_seeds / "study.json")
    assert (own.pop("conclusions"), theirs.pop("conclusions")) == ("It learns little.", None)
    assert "\n\nIt learns little.\n\n" in (tmp_path / "new" / "STUDY.md").read_text()
    assert own | {"command": None} == theirs | {"command": None}
    assert not list((tmp_path / "new").glob("seed-*/models"))


def test_what_is_kept_has_no_text(put_by: Path) -> None:
    files = sorted(put_by.rglob("*"))
    assert {file.suffix for file in files if file.is_file()} == {".json"}
    assert all("response" not in file.read_text() for file in files if file.is_file())


def test_a_seed_is_kept_by_the_data_that_it_was_made_of(
    two_seeds: Path, put_by: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_read(*_: object) -> None:
        raise AssertionError("the data were read")

    with monkeypatch.context() as patch:
        patch.setattr(kept, "dataset_of", not_read)
        keep(two_seeds, tmp_path / "again", load_design(two_seeds), 3)
    files = [directory / "seed-3" / "seed.json" for directory in (tmp_path / "again", put_by)]
    assert read_json(files[0])["key"] == read_json(files[1])["key"]
    assert kept_file(tmp_path / "again", load_design(two_seeds), 3) == files[0]


def test_a_kept_seed_of_other_settings_or_data_is_refused(two_seeds: Path, put_by: Path) -> None:
    design = load_design(two_seeds)
    assert kept_file(put_by, design, 3) == put_by / "seed-3" / "seed.json"
    assert kept_file(put_by, design, 5) is None
    with pytest.raises(DataError, match="of another design, or of other data"):
        kept_file(put_by, replace(design, replies=3), 3)
    data = design.config.data.model_copy(update={"pairs": 130})
    with pytest.raises(DataError, match="of another design, or of other data"):
        kept_file(put_by, replace(design, config=design.config.model_copy(update={"data": data})), 3)


def test_a_kept_file_that_was_changed_is_refused(two_seeds: Path, put_by: Path) -> None:
    file = put_by / "seed-3" / "ppo.json"
    file.write_text(file.read_text().replace("0.", "1.", 1))
    with pytest.raises(DataError, match=r"ppo\.json is not what was written"):
        kept_file(put_by, load_design(two_seeds), 3)


def _values(golds: list[float], nll: float, distinct: float) -> PolicyValues:
    flat = dict.fromkeys(("gold", "score", "kl", "length", "ended", "repetition_4"), (0.0, 0.0))
    return PolicyValues(**flat, golds={"j:f": tuple(golds)}, base_nll=nll, distinct_2=distinct)  # pyright: ignore


def _seed(ppo: PolicyValues) -> SeedValues:
    table = ((0.0, 0.0), (0.0, 0.0))
    tables = dict.fromkeys(("gold", "score", "length", "ended", "repetition_4", "win", "gold_win"), table)
    best = BestValues(**tables, golds={"j:f": ((0.1, 0.4), (0.1, 0.6))}, kl=(0.0, 0.19))  # pyright: ignore
    facts = SeedRecord(seconds=1.0, policies=("sft", "ppo"), reference="sft", tokens={})
    sets = {"sft": {"test": _values([0.1, 0.3], 3.0, 0.8)}, "ppo": {"test": ppo}}
    return SeedValues(
        seed=0, facts=facts, tables={}, best={}, best_kl=(), sets=sets, best_sets={"test": best}
    )


def test_gains_by_another_judge_are_on_the_same_prompts() -> None:
    found = [_seed(_values([0.3, 0.6], 3.0, 0.8))]
    ppo = other_judges(found, "ppo", "test", 200)["j:f"]
    assert (ppo["mean"], ppo["gain"]) == pytest.approx((0.45, 0.25))
    assert ppo["by_seed"] == pytest.approx([0.25])
    assert ppo["gain_low"] <= 0.25 <= ppo["gain_high"]
    assert other_judges(found, "best_of_2", "test", 200)["j:f"]["gain"] == pytest.approx(0.3)
    assert other_judges(found, "sft", "test", 200)["j:f"]["verdict"] is None


@pytest.mark.parametrize(
    ("nll", "distinct", "kl", "counts"),
    [
        (3.0 + math.log(1.4), 0.8 * 0.95, 9.0, True),
        (3.0 + math.log(1.6), 0.8 * 0.95, 9.0, False),
        (3.0 + math.log(1.4), 0.8 * 0.85, 9.0, False),
        (3.0 + math.log(1.4), 0.8 * 0.95, 11.0, False),
    ],
    ids=["within", "unlikely", "monotonous", "far"],
)
def test_a_gain_counts_within_limits(nll: float, distinct: float, kl: float, counts: bool) -> None:
    text = as_text([_seed(_values([0.3, 0.6], nll, distinct))], "ppo", "test", kl)
    assert text is not None
    assert text["counts"] is counts
    assert text["distinct_2_of_reference"] == pytest.approx(distinct / 0.8)
    assert text["perplexity_of_reference"] == pytest.approx(math.exp(nll - 3.0))


def test_variety_is_compared_at_one_amount_of_text_where_that_was_measured() -> None:
    """As seeds of before have none, which is of all replies."""
    seed = _seed(_values([0.3, 0.6], 3.0, 0.4).model_copy(update={"distinct_2_rarefied": 0.72}))
    sft = seed.sets["sft"]["test"].model_copy(update={"distinct_2_rarefied": 0.9})
    text = as_text([replace(seed, sets={**seed.sets, "sft": {"test": sft}})], "ppo", "test", 1.0)
    assert text is not None
    assert text["distinct_2_of_reference"] == pytest.approx(0.8)
    assert text["distinct_2_replies"] == 192
    assert text["counts"] is False
    half = as_text([seed], "ppo", "test", 1.0)  # SFT of before: both are of all replies
    assert half is not None
    assert half["distinct_2_of_reference"] == pytest.approx(0.5)
    before = as_text([_seed(_values([0.3, 0.6], 3.0, 0.4))], "ppo", "test", 1.0)
    assert before is not None
    assert before["distinct_2_replies"] is None


def test_without_measures_beside_gold_there_is_no_table() -> None:
    assert section({"policies": {"ppo": {"others": {}, "text": None}}, "seeds": []})[1] == []
