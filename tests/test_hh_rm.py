"""The reward-model lab (benchmarks/hh_rm.py): its sums, that it goes on, and that its page is its cells'."""

import argparse
import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import hh_rm
import hh_rm_table
import numpy as np
import pytest

from preftune.config import load_recipe
from preftune.runs.session import Session

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "studies" / "hh-rm" / "STUDY.md"

TIE = "\n\nHuman: validation 10?\n\nAssistant:"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chosen replies are longer by a word, and polite; files as HH's."""
    folder = tmp_path_factory.mktemp("hh") / "harmless-base"
    folder.mkdir()
    for split, count in (("train", 120), ("validation", 10)):
        lines = []
        for i in range(count):
            words = ["so", "it", f"is{i % 7}"]
            start = f"\n\nHuman: {split} {i}?\n\nAssistant:"
            lines.append(
                json.dumps(
                    {
                        "chosen": f"{start} please {' '.join(words)}",
                        "rejected": f"{start} {' '.join(words[i % 2 :])}",
                    }
                )
            )
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return folder.parent


def asked(data: Path, results: Path) -> argparse.Namespace:
    return argparse.Namespace(
        data=str(data),
        rows=["length", "terms"],
        fractions=["1/2", "1"],
        seeds=2,
        validation=None,
        work=results / "work",
        results=results,
    )


def test_rules_learn_what_is_there_and_a_second_command_makes_nothing_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hh_rm.run(asked(data, tmp_path))
    names = {file.name for file in tmp_path.glob("*-*.json")}
    assert names == {f"{row}-{f}.json" for row in ("length", "terms") for f in ("1of2-0", "1of2-1", "1-0")}
    for name in names:
        cell = json.loads((tmp_path / name).read_text())
        assert min(cell["margins"]) > 0
        assert len(cell["margins"]) == 10
        assert cell["pairs"] == (119 if "-1-" in name else 59)  # one prompt is the reader's test split
    (tmp_path / "length-1-0.json").unlink()
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(hh_rm, "cell_of", lambda *args: made.append(args) or {"margins": [1], "settings": {}})
    hh_rm.run(asked(data, tmp_path))
    assert [(row, fraction, seed) for row, _, fraction, seed, *_ in made] == [("length", "1", 0)]


def test_a_trained_row_is_a_run_of_the_recipe_and_scores_validation_pairs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 300, "steps": 1, "batch_size": 4}
    small = [f"model.scratch.{key}={value}" for key, value in scratch.items()]
    small += ["model.scratch.microbatch_size=4", "model.scratch.positions=256", "model.base=scratch"]
    small += ["model.trainable=top:1", "stage.rm.microbatch_size=4", "data.max_response_length=3"]
    monkeypatch.setitem(hh_rm.MODELS, "smollm2-top6", hh_rm.Model("hh-rm", "rm", (*hh_rm.ONE_MODEL, *small)))
    cut = {"chosen": f"{TIE} please so it", "rejected": f"{TIE} please so it is"}  # alike to the third token
    longer = Path(shutil.copytree(data, tmp_path / "data"))
    with gzip.open(longer / "harmless-base" / "validation.jsonl.gz", "at", encoding="utf-8") as file:
        file.write(json.dumps(cut) + "\n")
    options = vars(asked(longer, tmp_path)) | {"rows": ["smollm2-top6"], "seeds": 1}
    hh_rm.run(argparse.Namespace(**options | {"fractions": ["1/2"]}))
    cell = json.loads((tmp_path / "smollm2-top6-1of2-0.json").read_text())
    assert (cell["pairs"], len(cell["margins"]), sorted(cell["validation"])) == (59, 11, list(range(11)))
    zeros = [i for i, margin in zip(cell["validation"], cell["margins"], strict=True) if margin == 0]
    assert zeros == [10]  # a tie: no model was asked
    ledger = (tmp_path / "work" / "smollm2-top6-59-0" / "stages" / "rm" / "ledger.jsonl").read_text()
    rows = {name for line in ledger.splitlines() for name in json.loads(line)["rows"]}
    drawn = hh_rm.read(str(data)).drawn(59, 0)
    assert rows == {f"{pair.source}:{pair.row}" for pair in drawn}


@pytest.mark.parametrize("row", hh_rm.MODELS)
def test_every_row_is_a_recipe_with_a_stage_that_scores(row: str) -> None:
    model = hh_rm.MODELS[row]
    config = load_recipe(model.recipe, model.settings("any", 0, 50)).config
    few = {"smollm2-top6-experts-mean-few": 3314}  # of each kind
    assert config.stage[model.stage].rows == few.get(row, None if model.whole else 50)
    assert hh_rm_table.LABELS[row]


def test_a_source_is_left_out_of_a_copy(tmp_path: Path) -> None:
    for source in ("harmless-base", "helpful-extra"):
        (tmp_path / "all" / source).mkdir(parents=True)
        (tmp_path / "all" / source / "train.jsonl").write_text("")
    for _ in range(2):  # a second cell finds it there
        copied = hh_rm.without(str(tmp_path / "all"), "helpful-extra", tmp_path / "copied")
    assert [folder.name for folder in Path(copied).iterdir()] == ["harmless-base"]


@pytest.mark.parametrize("reason", ["response_too_long_became_equal", "too_long"])
def test_a_pair_is_a_tie_only_where_its_replies_are_alike_to_the_model(reason: str) -> None:
    encoder = SimpleNamespace(encoded=lambda pairs, rejected: rejected.update([reason]) or iter(pairs[1:]))
    if reason == "too_long":
        with pytest.raises(SystemExit, match=r"cannot be encoded: .'too_long': 1"):
            hh_rm.told_apart(cast(Any, encoder), cast(Any, ["a", "b"]))
    else:
        assert hh_rm.told_apart(cast(Any, encoder), cast(Any, ["a", "b"])) == ["b"]


def test_a_share_of_the_pairs_is_what_a_run_of_that_seed_learns_from(data: Path) -> None:
    pairs = hh_rm.read(str(data))
    session = cast(Session, SimpleNamespace(config=SimpleNamespace(seed=3)))
    assert pairs.drawn(40, 3) == Session.shuffled(session, pairs.train)[:40]


def test_the_slope_on_length_is_that_of_least_squares_through_the_origin() -> None:
    # (1 * 1 + 3 * 2 - 1 * 2) / (1 + 4 + 4)
    assert hh_rm.slope_on_length(np.array([1.0, 3.0, -1.0]), np.array([1.0, 2.0, 2.0])) == pytest.approx(
        5 / 9
    )


def test_the_fits_of_a_curve_find_the_curve_that_made_it() -> None:
    counts = np.array([1000.0, 2000.0, 4000.0, 8000.0])
    a, b, far, miss = hh_rm_table.by_log(counts, 0.2 + 0.05 * np.log(counts)[None])[:, 0]
    assert (a, b, far, miss) == pytest.approx((0.2, 0.05, 0.2 + 0.05 * np.log(160_000), 0), abs=1e-9)
    e, c, far, miss, alpha = hh_rm_table.by_power(counts, 1 - 0.3 - 2 * counts[None] ** -0.5)[:, 0]
    assert (e, c, far, miss, alpha) == pytest.approx((0.3, 2.0, 0.695, 0, 0.5), abs=1e-6)


def test_the_page_is_what_the_cells_say() -> None:
    """But for the last digits of bootstrap intervals, since numpy may change its streams."""
    number = re.compile(r"[-+]?\d+\.\d+")
    there, made = PAGE.read_text(encoding="utf-8"), hh_rm_table.study(hh_rm.RESULTS)
    assert number.sub("x", there) == number.sub("x", made)
    found, expected = (np.array(number.findall(text), dtype=float) for text in (there, made))
    np.testing.assert_allclose(found, expected, atol=0.005)


def test_what_the_studies_page_shows_is_on_the_page_of_tables() -> None:
    """Every row of accuracies, and every interval."""
    page = PAGE.read_text(encoding="utf-8")
    text = (PAGE.parents[1] / "hh-rm.md").read_text(encoding="utf-8")
    shown = re.findall(r"[-+]?\d\.\d{3} \[[-+]?\d\.\d{3}, [-+]?\d\.\d{3}\]", text)
    assert len(shown) > 20
    assert not [each for each in shown if each not in page]


def test_cells_hold_no_text() -> None:
    keys = {"row", "pairs", "seed", "of", "margins", "slope", "settings", "validation", "fraction"}
    files = sorted(hh_rm.RESULTS.glob("*-*.json"))
    assert files
    for file in files:
        cell = json.loads(file.read_text(encoding="utf-8"))
        assert cell.keys() == keys
        assert len(json.dumps(cell["settings"])) < 600
