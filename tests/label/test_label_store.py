"""Judgements on disk: nothing is lost, doubled or told to a rater."""

import json
import os
from pathlib import Path

import pytest
from label_run import begun, collected, judge_all, sampled, say

from preftune.errors import ConfigError, DataError, UsageError
from preftune.label.judgements import Undone, standing
from preftune.label.store import Conflict, Store
from preftune.rundir import append_jsonl, read_jsonl
from preftune.runs.restart import remove_run


def test_a_judgement_is_on_the_disk_before_it_counts_and_a_new_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(collected(tmp_path, n=5))
    synced: list[str] = []
    real = os.fsync

    def fsync(number: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    state = store.state("me")
    store.record("me", say(state, "a", note="short", seconds=1.5))
    path = store.file("me")
    assert synced == [str(path), str(store.folder)]  # the file, and its name in the folder
    row = read_jsonl(path)[0]
    item = store.items[row["item"]]
    assert item.replies[row["a"]] == state["slot"]["a"]
    assert (row["verdict"], row["note"], row["seconds"], row["again"]) == ("a", "short", 1.5, False)
    again = Store(store.folder)
    assert again.state("me") == store.state("me")
    assert again.state("me")["done"] == 1


def test_replies_of_another_stage_are_not_taken_for_those_of_a_set_that_was_begun(tmp_path: Path) -> None:
    run = sampled(tmp_path, n=5)
    collected(tmp_path, n=5)
    begun(run, source="pairs", name="mine")
    assert begun(run, name="mine").design.source == "pairs"
    assert begun(run, source="pairs", name="mine").design.source == "pairs"
    with pytest.raises(ConfigError, match="was begun with source pairs, not sft-against-dpo"):
        begun(run, source="sft,dpo", name="mine")
    with pytest.raises(UsageError, match="no replies collected by 'other'"):
        begun(run, source="other", name="mine")


def test_what_is_sent_twice_counts_once_and_another_tab_is_told(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=5))
    state = store.state("me")
    first = say(state, "b")
    store.record("me", first)
    store.record("me", first)
    with pytest.raises(Conflict):
        store.record("me", say(state, "a"))
    assert len(read_jsonl(store.file("me"))) == 1


def test_undo_takes_back_the_last_ones_one_by_one_and_the_file_only_grows(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=5, replies=2), tags=["brief"])
    first = store.state("me")
    store.record("me", say(first, "b", tags=["brief"], corrected="Better"))
    second = store.state("me")
    store.record("me", say(second, "tie"))
    before = store.file("me").read_bytes()
    for expected in (second, first):
        undone = Undone(id=os.urandom(8).hex(), of=store.state("me")["last"])
        store.undo("me", undone)
        store.undo("me", undone)  # sent twice
        assert store.state("me")["slot"] == expected["slot"]
    assert store.state("me")["before"] == {
        "verdict": "b",
        "tags": ["brief"],
        "note": "",
        "corrected": "Better",
    }
    assert store.state("me")["last"] is None
    assert store.file("me").read_bytes().startswith(before)
    store.record("me", say(store.state("me"), "a"))
    assert [event.verdict for event in standing(Store(store.folder).events["me"]).values()] == ["a"]
    with pytest.raises(Conflict):
        store.undo("me", Undone(id="0" * 8, of="1" * 8))


def test_a_torn_line_is_dropped_and_the_next_judgement_stands_on_its_own(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=5))
    store.record("me", say(store.state("me"), "a"))
    with store.file("me").open("ab") as file:
        file.write(b'{"seq": 2, "id": "abc')
    after = Store(store.folder)
    assert after.state("me")["done"] == 1
    after.record("me", say(after.state("me"), "b"))
    assert [row["seq"] for row in read_jsonl(store.file("me"), whole=True)] == [1, 2]


def test_a_damaged_line_is_refused_by_file_and_line(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=5))
    append_jsonl(store.file("me"), {"seq": 1, "id": "12345678", "item": "0" * 16, "verdict": "a"})
    with pytest.raises(DataError, match=r"me.judgements.jsonl:1: no item"):
        Store(store.folder)
    store.file("me").write_text('{"seq": 1, "id": "1", "verdict": "maybe"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="verdict"):
        Store(store.folder)


def test_a_rater_is_told_nothing_of_whose_a_reply_is_nor_how_it_scored(tmp_path: Path) -> None:
    store = begun(sampled(tmp_path, n=5))
    state = store.state("me")
    assert set(state) == {"rater", "done", "total", "tags", "last", "slot", "before"}
    assert set(state["slot"]) == {"key", "prompt", "a", "b"}
    assert "policy_" not in json.dumps(state)


def test_hidden_characters_are_shown(tmp_path: Path) -> None:
    run = collected(tmp_path, n=1)
    path = tmp_path / "collected/pairs/replies.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Reply 0.0", "abc\\u202edef"), encoding="utf-8")
    slot = begun(run).state("me")["slot"]
    assert "abc⟨U+202E⟩def" in (slot["a"], slot["b"])


def test_unknown_slots_and_tags_are_refused(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=5), tags=["brief"])
    state = store.state("me")
    with pytest.raises(UsageError, match="no such item"):
        store.record("me", say({"slot": {"key": "0" * 16 + "-0"}}, "a"))
    with pytest.raises(UsageError, match="unknown tag"):
        store.record("me", say(state, "a", tags=["other"]))


def test_several_raters_finish_with_the_overlap_asked_for(tmp_path: Path) -> None:
    store = begun(collected(tmp_path, n=40), overlap=0.5, raters=["anna", "ben"], repeats=0.0)
    assert judge_all(store, "anna", "a") == 30
    assert judge_all(store, "ben", "b") == 30
    judged = [{event.item for event in slots.values()} for slots in store.standing().values()]
    assert len(judged[0] & judged[1]) == 20
    assert judged[0] | judged[1] == set(store.items)


def test_who_joins_later_gets_what_nobody_has_judged(tmp_path: Path) -> None:
    run = collected(tmp_path, n=20)
    store = begun(run, overlap=0.0, raters=["anna"], repeats=0.0)
    for _ in range(8):
        store.record("anna", say(store.state("anna"), "a"))
    store = begun(run, raters=["ben"])
    judge_all(store, "ben", "b")
    judge_all(store, "anna", "a")
    judged = [event.item for slots in store.standing().values() for event in slots.values()]
    assert sorted(judged) == sorted(store.items)


def test_links_are_secret_and_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(collected(tmp_path, n=2), raters=["anna", "ben"])
    modes, replace = list[int](), os.replace

    def seen(old: Path, new: Path) -> None:
        modes.append(old.stat().st_mode & 0o077)
        replace(old, new)

    monkeypatch.setattr(os, "replace", seen)
    tokens = store.tokens()
    assert modes == [0]
    assert len(set(tokens.values())) == 3
    assert all(len(token) >= 32 for token in tokens.values())
    assert Store(store.folder).tokens() == tokens
    assert (store.folder / ".links.json").stat().st_mode & 0o077 == 0


def test_a_run_that_begins_again_leaves_what_people_said(tmp_path: Path) -> None:
    run = sampled(tmp_path, n=4)
    store = begun(run)
    judge_all(store, "me", "a")
    removed = remove_run(run)
    assert run.samples_file("policy_sft") in removed
    assert Store(store.folder).state("me")["done"] == 4
