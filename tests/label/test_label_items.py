"""What is judged, in which order, by whom and on which side."""

from collections import Counter
from pathlib import Path

import pytest
from label_run import begun, collected, sampled

from preftune.data import Dialogue, Turn
from preftune.errors import ConfigError, DataError, InputMissing, UsageError
from preftune.label.design import GAP, Design, queue
from preftune.label.items import find_source, read_items
from preftune.rundir import RunDir, read_jsonl, write_json, write_jsonl, write_text


def test_replies_of_a_stage_become_items_that_keep_roles_scores_and_row(tmp_path: Path) -> None:
    run = collected(tmp_path, n=3)
    items = {item.row: item for item in read_items(find_source(run, None), seed=0)}
    assert sorted(items) == [0, 1, 2]
    assert [(turn.role, turn.content) for turn in items[2].prompt] == [("user", "Question 2?")]
    assert items[2].replies == ("Reply 2.0", "Reply 2.1!")
    assert items[2].scores == pytest.approx((0.0, 0.1))


def test_without_such_a_stage_two_policies_samples_of_the_same_prompt_are_compared(tmp_path: Path) -> None:
    run = sampled(tmp_path, n=4)
    source = find_source(run, None)
    assert source.policies == ("policy_sft", "policy_dpo")
    item = next(item for item in read_items(source, 0) if item.row == 3)
    assert item.replies == ("By sft 3", "By dpo 3")
    assert item.prompt[0].content == "Question 3?"
    assert find_source(run, "dpo,sft").policies == ("policy_dpo", "policy_sft")


def test_a_system_turn_of_a_sample_stays_one(tmp_path: Path) -> None:
    run = sampled(tmp_path, n=1)
    turns = [
        Turn("system", " Be brief."),
        Turn("human", " Why?"),
        Turn("assistant", " So."),
        Turn("human", " Oh"),
    ]
    for file in run.samples_files().values():
        write_jsonl(file, [row | {"prompt": Dialogue(turns).transcript()} for row in read_jsonl(file)])
    (item,) = read_items(find_source(run, None), 0)
    assert [(turn.role, turn.content) for turn in item.prompt] == [
        ("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "Oh")
    ]  # fmt: skip


def test_what_imitates_is_found_by_its_algorithm(tmp_path: Path) -> None:
    run = sampled(tmp_path, n=1)
    run.samples_file("policy_sft").rename(run.samples_file("policy_warm"))
    write_text(run.config, run.config.read_text("utf-8").replace("[stage.sft]", "[stage.warm]"))
    assert find_source(run, None).policies == ("policy_warm", "policy_dpo")


def test_equal_replies_are_no_item(tmp_path: Path) -> None:
    run = collected(tmp_path, n=2)
    rows = read_jsonl(tmp_path / "collected/pairs/replies.jsonl")
    rows[0]["replies"] = ["same", " same "]
    write_jsonl(tmp_path / "collected/pairs/replies.jsonl", rows)
    assert [item.row for item in read_items(find_source(run, None), 0)] == [1]
    write_jsonl(tmp_path / "collected/pairs/replies.jsonl", rows[:1])
    with pytest.raises(DataError, match="no two different replies"):
        read_items(find_source(run, None), 0)


def test_the_smallest_margin_comes_first_on_request(tmp_path: Path) -> None:
    run = collected(tmp_path, n=6, replies=3)
    items = read_items(find_source(run, None), 0, informative=True)
    assert [item.row for item in items] == [5, 4, 3, 2, 1, 0]
    assert all(
        item.certainty == pytest.approx(0.1 * (6 - (item.row or 0))) for item in items
    )  # the closest pair
    slots = queue(Design(source="pairs", informative=True, repeats=0.0), items, "me")
    assert [slot.item.row for slot in slots] == [5, 4, 3, 2, 1, 0]
    assert len(read_items(find_source(run, None), 0, all_pairs=True)) == 18


def test_of_an_ensemble_the_largest_disagreement_comes_first(tmp_path: Path) -> None:
    """Whatever the margins: prompt i's members differ by ±i about which reply is better; sd of (-i, 0, i)."""
    run = collected(tmp_path, n=4)
    path = tmp_path / "collected/pairs/replies.jsonl"
    rows = [row | {"members": [[-row["row"], 0.0, row["row"]], [0.0, 0.0, 0.0]]} for row in read_jsonl(path)]
    write_jsonl(path, rows)
    items = read_items(find_source(run, None), 0, informative=True)
    assert [item.row for item in items] == [3, 2, 1, 0]
    assert items[0].disagreement == pytest.approx(3 * (2 / 3) ** 0.5)
    write_jsonl(path, [{**rows[0], "members": [[1.0]]}])
    with pytest.raises(DataError, match="1 members' scores of 2 replies"):
        read_items(find_source(run, None), 0)


def test_without_scores_nothing_is_more_informative(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no scores"):
        read_items(find_source(collected(tmp_path, scores=False), None), 0, informative=True)


def test_sources_that_are_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no samples of two such policies"):
        find_source(RunDir(tmp_path), None)
    with pytest.raises(UsageError, match="collected by 'x'"):
        find_source(collected(tmp_path), "x")
    write_jsonl(tmp_path / "collected/more/replies.jsonl", [])
    with pytest.raises(UsageError, match="several stages collected: more, pairs"):
        find_source(RunDir(tmp_path), None)


def test_each_item_goes_to_one_rater_and_the_shared_ones_to_all(tmp_path: Path) -> None:
    items = read_items(find_source(collected(tmp_path, n=100), None), 0)
    design = Design(source="pairs", overlap=0.2, repeats=0.0, raters=("anna", "ben"))
    own = [Counter(slot.item.id for slot in queue(design, items, rater)) for rater in design.raters]
    both = own[0].keys() & own[1].keys()
    assert len(both) == 20
    assert len(own[0].keys() | own[1].keys()) == 100
    assert [count.total() for count in own] == [60, 60]
    orders = [
        [slot.item.id for slot in queue(design, items, r) if slot.item.id in both] for r in design.raters
    ]
    assert orders[0] != orders[1]


def test_a_twentieth_comes_again_later_with_the_sides_exchanged(tmp_path: Path) -> None:
    items = read_items(find_source(collected(tmp_path, n=200), None), 0)
    slots = queue(Design(source="pairs"), items, "me")
    again = [(place, slot) for place, slot in enumerate(slots) if slot.again]
    assert len(slots) == 210
    assert len(again) == 10
    for place, slot in again:
        first = next(p for p, other in enumerate(slots) if other.item.id == slot.item.id)
        assert place - first >= GAP
        assert slots[first].a == 1 - slot.a
    sides = Counter(slot.a for slot in slots if not slot.again)
    assert 70 <= sides[0] <= 130  # binomial(200, 1/2): outside once in 40,000
    assert slots == queue(Design(source="pairs"), items, "me")
    assert slots != queue(Design(source="pairs", seed=1), items, "me")


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_few_items_have_a_queue_too(tmp_path: Path, n: int) -> None:
    items = read_items(find_source(collected(tmp_path, n=n), None), 0)
    slots = queue(Design(source="pairs", repeats=1.0), items, "me")
    assert {slot.item.id for slot in slots} == {item.id for item in items}
    assert slots[0].again is False
    assert len({slot.key for slot in slots}) == len(slots)


def test_a_set_stays_as_it_was_begun_and_raters_may_join(tmp_path: Path) -> None:
    run = collected(tmp_path, n=10)
    first = begun(run, seed=3, raters=["anna"])
    (tmp_path / "collected/pairs/replies.jsonl").write_text("", encoding="utf-8")  # a later round
    again = begun(run, raters=["ben"])
    assert list(again.items) == list(first.items)
    assert again.design.raters == ("anna", "ben")
    assert [s.key for s in first.slots("anna")] == [s.key for s in again.slots("anna")]
    with pytest.raises(ConfigError, match="begun with seed 3, not 4"):
        begun(run, seed=4)


def test_items_that_were_changed_are_refused(tmp_path: Path) -> None:
    run = collected(tmp_path, n=3)
    begun(run)
    path = run.labels("pairs") / "items.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Reply", "reply", 1), encoding="utf-8")
    with pytest.raises(DataError, match="changed after judging began"):
        begun(run)
    design = run.labels("pairs") / "design.json"
    write_json(design, {"source": 3})
    with pytest.raises(DataError, match="source"):
        begun(run)


@pytest.mark.parametrize("name", ["../out", "a/b", "", "x" * 41])
def test_names_of_sets_and_raters_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    run = collected(tmp_path, n=3)
    with pytest.raises(UsageError, match="letters, digits"):
        begun(run, name=name)
    with pytest.raises(UsageError, match="letters, digits"):
        begun(run, raters=[name])
    with pytest.raises(UsageError, match=r"greater than or equal to 1$"):
        begun(run, limit=0)
    begun(run)
    with pytest.raises(UsageError, match="letters, digits"):
        begun(run, raters=[name])
