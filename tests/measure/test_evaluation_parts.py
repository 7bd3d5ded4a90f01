"""Parts of an evaluation on disk: used again if nothing that they depend on has changed, and whole."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from preftune.data import Dialogue, Preference, Turn
from preftune.measure.cache import Cache, content

VALUE = ([{"row": 0, "kl": math.inf, "response": "NaN \ud800\u2028", "score": 0.1 + 0.2}], [math.nan, 1e-300])


def parts(directory: Path, said: list[str], **inputs: Any) -> Cache:
    return Cache(directory=directory, inputs={"seed": 0, **inputs}, say=said.append)


def never() -> Any:
    raise AssertionError("measured again")


def test_a_part_is_the_same_whether_made_or_read(tmp_path: Path) -> None:
    said: list[str] = []
    made = parts(tmp_path, said).take("base", {"stage": "a"}, lambda: VALUE)
    assert not said
    read = parts(tmp_path, said).take("base", {"stage": "a"}, never)
    assert repr(read) == repr(made)  # a NaN equals nothing
    assert said == ["evaluation of base: already measured"]
    (row,), (nan, tiny) = made
    assert math.isnan(nan)
    assert (row["kl"], row["response"], row["score"], tiny) == (
        *(math.inf, "NaN \ud800\u2028", 0.30000000000000004, 1e-300),
    )


@pytest.mark.parametrize(("inputs", "of"), [({"seed": 1}, "a"), ({}, "b")], ids=["inputs", "stage"])
def test_a_part_of_other_inputs_is_made_again(tmp_path: Path, inputs: dict[str, int], of: str) -> None:
    parts(tmp_path, []).take("base", {"stage": "a"}, lambda: 1)
    assert parts(tmp_path, [], **inputs).take("base", {"stage": of}, lambda: 2) == 2
    assert parts(tmp_path, [], **inputs).take("base", {"stage": of}, never) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "of another form"])
def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    parts(tmp_path, said).take("base", {}, lambda: [1.25])
    file = tmp_path / "base.json"
    text = file.read_text()
    changed = json.dumps(json.loads(text) | {"value": [1.5]})
    file.write_text({"cut": text[:-9], "empty": "", "changed": changed, "of another form": "[1]"}[damage])
    assert parts(tmp_path, said).take("base", {}, lambda: [1.25]) == [1.25]
    assert said == [f"{file} is damaged; making it again"]
    assert parts(tmp_path, said).take("base", {}, never) == [1.25]


def test_nothing_is_left_in_the_end(tmp_path: Path) -> None:
    made = parts(tmp_path / "parts", [])
    made.remove()
    made.take("base", {}, lambda: 1)
    made.remove()
    assert not (tmp_path / "parts").exists()


def test_pairs_of_another_source_or_with_a_reply_that_did_not_end_are_others() -> None:
    def hashed(source: str = "", **columns: Any) -> str:
        prompt = Dialogue([Turn("human", " Q")])
        row = Preference(prompt=prompt, chosen=" a", rejected=" b", source=source, columns=columns)
        return content([row])

    found = [hashed(), hashed("harmless"), hashed(ended_chosen=False), hashed(ended_rejected=False)]
    assert len(set(found)) == 4
    assert hashed(read_by_nobody=1) == hashed()
