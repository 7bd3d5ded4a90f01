"""Results against counts by hand; the export, and that data and stages read it; a static file's results."""

from pathlib import Path
from typing import Any

import pytest
from label_run import begun, collected, judge_all, sampled, say

import prose
from preftune.config import DataConfig
from preftune.data import load_dataset
from preftune.errors import DataError
from preftune.label.export import export, take
from preftune.label.results import as_rows, results
from preftune.label.store import Store
from preftune.records.base import Estimate
from preftune.rundir import read_jsonl, write_json


def found(store: Store) -> dict[str, Estimate | None]:
    return {line.key: line.value for line in results(store)}


def value(store: Store, key: str) -> float:
    line = found(store)[key]
    assert line is not None
    return line.value


def test_shares_by_hand(tmp_path: Path) -> None:
    """SFT against DPO: of 8 items DPO wins 5, ties 1, loses 1, one is skipped: 5.5 of 7."""
    store = begun(sampled(tmp_path, n=8), repeats=0.0)
    for place in range(8):
        slot = store.state("me")["slot"]
        dpo = "a" if "By dpo" in slot["a"] else "b"
        word = [*[dpo] * 5, "bad", "b" if dpo == "a" else "a", "skip"][place]
        store.record("me", say(store.state("me"), word))
    line = found(store)["win_rate"]
    assert line is not None
    assert line.value == pytest.approx(5.5 / 7)
    assert line.n == 7
    assert line.low is not None
    assert line.high is not None
    assert line.low < 0.5 < line.high
    assert value(store, "ties") == pytest.approx(1 / 7)
    assert found(store)["reward_model"] is None  # no scores
    assert found(store)["length"] is None  # replies of one length
    assert found(store)["alpha"] is None


def test_side_length_and_reward_model_are_told_apart(tmp_path: Path) -> None:
    """A rater who always says A, and one who prefers the longer reply, which the reward model prefers too."""
    run = collected(tmp_path, n=60)
    always_a = begun(run, name="one", repeats=0.1)
    judge_all(always_a, "me", "a")
    assert value(always_a, "side") == 1.0
    assert value(always_a, "repeats") == 0.0  # sides are exchanged
    assert 0.3 < value(always_a, "length") < 0.7
    longer = begun(run, name="two", repeats=0.1)
    judge_all(longer, "me", lambda slot: "a" if len(slot["a"]) > len(slot["b"]) else "b")
    assert [value(longer, key) for key in ("length", "reward_model", "repeats")] == [1.0, 1.0, 1.0]
    assert 0.3 < value(longer, "side") < 0.7
    line = found(longer)["length"]
    assert line is not None
    assert line.low is not None
    assert line.low > 0.5


def test_raters_who_agree_and_who_do_not(tmp_path: Path) -> None:
    run = collected(tmp_path, n=20)
    agree = begun(run, name="one", raters=["anna", "ben"])
    by_length = {True: "a", False: "b"}
    judge_all(agree, "anna", lambda slot: by_length[slot["a"].endswith("!") != ("7." in slot["a"])])
    judge_all(agree, "ben", lambda slot: by_length[slot["a"].endswith("!") != ("7." in slot["a"])])
    assert value(agree, "alpha") == 1.0
    apart = begun(run, name="two", raters=["anna", "ben"])
    judge_all(apart, "anna", lambda slot: by_length[slot["a"].endswith("!")])
    judge_all(apart, "ben", lambda slot: by_length[not slot["a"].endswith("!")])
    assert value(apart, "alpha") == pytest.approx(1 - 39 * 40 / 800)  # 40 values, half of each, no pair alike


def test_no_interval_where_the_closest_pairs_come_first(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=20), informative=True, repeats=0.2)
    judge_all(store, "me", "a")
    for key in ("reward_model", "repeats"):
        line = found(store)[key]
        assert line is not None
        assert line.low is None
    assert "no sample of all" in as_rows(store)["notes"][0]


def test_the_export_is_read_as_preferences(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=20), repeats=0.2)
    judge_all(store, "me", lambda slot: "a" if slot["a"].endswith("!") else "b")
    assert export(store, tmp_path / "mine.jsonl") == (20, 0, 0)
    row = read_jsonl(tmp_path / "mine.jsonl")[0]
    assert row["prompt"][0]["role"] == "user"
    assert row["chosen"] == [{"role": "assistant", "content": row["rejected"][0]["content"][:-1] + "1!"}]
    assert (row["judge"], row["agreement"], row["judgements"]) == ("people:me", 1.0, 1)
    data = load_dataset(DataConfig(name=str(tmp_path / "mine.jsonl")))
    pairs = [*data.train, *data.validation, *data.test]
    assert len(pairs) == 20
    assert all(pair.chosen.endswith("!") and not pair.rejected.endswith("!") for pair in pairs)
    assert {pair.ended for pair in pairs} == {(False, True)}  # no end is learnt where the reply was cut


def test_raters_who_disagree_give_no_pair_and_a_majority_says_how_large(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=4), raters=["anna", "ben", "cleo"], repeats=0.0)
    for rater, words in {"anna": "1110", "ben": "110t", "cleo": "1t0t"}.items():
        for _ in range(4):
            state = store.state(rater)
            item = store.items[state["slot"]["key"].partition("-")[0]]
            word = words[item.row or 0]
            better = state["slot"]["a"] == item.replies[int(word == "1")]
            store.record(rater, say(state, "tie" if word == "t" else "a" if better else "b"))
    assert export(store, tmp_path / "out.jsonl") == (3, 0, 1)
    rows = {row["prompt"][0]["content"]: row for row in read_jsonl(tmp_path / "out.jsonl")}
    assert [rows[f"Question {i}?"]["agreement"] for i in range(3)] == pytest.approx([1.0, 2 / 3, 2 / 3])
    assert rows["Question 2?"]["chosen"][0]["content"] == "Reply 2.0"
    assert "Question 3?" not in rows  # one for the first, two ties


def test_a_corrected_reply_is_preferred_to_what_it_corrects(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=2), repeats=0.0)
    state = store.state("me")
    store.record("me", say(state, "a", corrected="Best of all"))
    store.record("me", say(store.state("me"), "bad", corrected="Best of all"))
    assert export(store, tmp_path / "out.jsonl") == (4, 3, 1)
    rows = read_jsonl(tmp_path / "out.jsonl")
    own = [row["rejected"][0]["content"] for row in rows if row["chosen"][0]["content"] == "Best of all"]
    assert len(own) == 3
    cut = {
        row["rejected"][0]["content"].endswith("!"): row["ended_rejected"]
        for row in rows
        if row["ended_chosen"]
    }
    assert cut == {True: False, False: True}
    assert state["slot"]["a"] in own
    assert state["slot"]["b"] not in own


def test_nothing_judged_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no preference yet"):
        export(begun(collected(tmp_path, n=2)), tmp_path / "out.jsonl")


def saved(store: Store, rater: str) -> dict[str, Any]:
    """What the static page saves after every item was judged A."""
    judgements = [
        say({"slot": {"key": slot.key}}, "a").model_dump(mode="json") for slot in store.slots(rater)
    ]
    return {"set": store.design.items_sha256, "rater": rater, "judgements": judgements}


def test_a_static_files_results_come_in_once(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=20), raters=["anna", "ben"])
    path = tmp_path / "back.json"
    row = saved(store, "ben")
    write_json(path, row | {"judgements": row["judgements"][:12]})
    assert take(store, path) == (12, 0)
    write_json(path, row)
    assert take(store, path) == (9, 12)
    assert take(Store(store.folder), path) == (0, 21)
    assert {event.by for event in Store(store.folder).standing()["ben"].values()} == {"file"}


def test_a_file_made_before_another_rater_joined_still_comes_in_whole(tmp_path: Path) -> None:
    run = collected(tmp_path, n=20)
    store = begun(run, raters=["anna"], overlap=0.0, repeats=0.2)
    sides = {slot.key: slot.a for slot in store.slots("anna")}
    write_json(tmp_path / "back.json", saved(store, "anna"))
    store = begun(run, raters=["ben"])
    assert len(store.slots("anna")) < len(sides) == 24
    assert take(store, tmp_path / "back.json") == (24, 0)
    assert {event.slot: event.a for event in Store(store.folder).events["anna"]} == sides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set": "0" * 64}, "no judgements of the set"),
        ({"rater": "eve"}, "'eve' is no rater"),
        ({"rater": 3}, "no rater"),
        ({"judgements": "all"}, "no judgements of the set"),
        ({"judgements": [{"id": "12345678", "slot": "0" * 16 + "-0", "verdict": "a"}]}, "is of no item"),
        ({"judgements": [{"id": "12345678", "slot": "../..", "verdict": "a"}]}, "judgement 1: slot"),
        ({"judgements": [7]}, "judgement 1"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    store = begun(collected(tmp_path, n=5), raters=["anna", "ben"])
    write_json(tmp_path / "back.json", saved(store, "ben") | change)
    with pytest.raises(DataError, match=message):
        take(store, tmp_path / "back.json")
    assert not store.file("ben").exists()


def test_two_raters_of_opposite_mind_give_no_pair_and_the_second_changes_no_share(tmp_path: Path) -> None:
    store = begun(sampled(tmp_path, n=6), raters=["anna", "ben"], repeats=0.0)
    judge_all(store, "anna", lambda slot: "a" if "By dpo" in slot["a"] else "b")
    before = found(store)
    judge_all(store, "ben", lambda slot: "a" if "By sft" in slot["a"] else "b")
    after = found(store)
    assert value(store, "win_rate") == 1.0
    assert {**after, "alpha": None} == {**before, "alpha": None}
    with pytest.raises(DataError, match="no preference yet"):
        export(store, tmp_path / "out.jsonl")


def test_shares_are_shown_in_percent_and_alpha_as_a_number(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=12), raters=["anna", "ben"], repeats=0.0)
    judge_all(store, "anna", "a")
    for key, text in zip(as_rows(store)["numbers"], as_rows(store)["rows"], strict=True):
        assert (text[1] == "–") is (key in ("alpha", "repeats"))
    judge_all(store, "ben", "b")
    shown = {row[0]: row[1:] for row in as_rows(store)["rows"]}
    assert next(row for name, row in shown.items() if "A is preferred" in name)[0].startswith("100.0 % [")
    prose.compare("label/label_results: names of the numbers", *shown)
    assert "%" not in shown["agreement between raters, Krippendorff's α"][0]
    assert shown["agreement between raters, Krippendorff's α"][1:] == ["12", "bootstrap, one look"]
