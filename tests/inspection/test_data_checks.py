"""`inspect --data`: what was planted in a file is found, counted by hand, and shown without its hidden
characters.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import prose
from preftune.cli import main
from preftune.data import Dialogue, Preference, Turn
from preftune.data.dataset import make_dataset
from preftune.inspection.dataset import Finding, examine, lines
from preftune.rundir import write_jsonl

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def row(number: int, chosen: str, rejected: str, ask: str = "") -> Preference:
    return Preference(
        prompt=Dialogue((Turn("human", f" {ask or f'Question {number}?'}"),)),
        chosen=chosen,
        rejected=rejected,
    )


def look(train: list[Preference], test: list[Preference] | None = None) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in examine(make_dataset({"train": train, "validation": [], "test": test or []}, {})):
        found.setdefault(finding.kind, []).append(finding)
    return found


def clean_rows(count: int = 40) -> list[Preference]:
    """Replies of one length, of words that occur once on either side."""
    return [row(i, f" a{i} b{i} c{i} d{i} e{i}.", f" f{i} g{i} h{i} i{i} j{i}.") for i in range(count)]


def test_a_clean_file_shows_nothing() -> None:
    found = look(clean_rows(), [row(99, " k l m n o.", " p q r s t.")])
    assert {kind: [f.count for f in each] for kind, each in found.items() if any(f.count for f in each)} == {}
    (length,) = found["length bias"]
    assert (length.of, "no bias" in length.text) == (0, True)


def test_repeats_and_contradictions_are_counted_without_case_and_blanks() -> None:
    rows = clean_rows()
    rows += [row(0, " A0  B0 c0 d0 e0.", " f0 g0 h0 i0 j0.")]  # row 0 again
    rows += [row(1, rows[1].rejected, rows[1].chosen), row(2, rows[2].rejected, rows[2].chosen)]
    found = look(rows)
    (repeats,), (contradictions,) = found["duplicates"], found["contradictions"]
    assert (repeats.count, repeats.of) == (1, 43)
    assert "train 0, train 40" in repeats.examples[0]
    assert contradictions.count == 2
    assert contradictions.examples[0].startswith("train 1 and train 41")


def test_length_bias_comes_with_wilsons_interval() -> None:
    rows = [row(i, f" a{i} b c" if i < 30 else f" a{i}", f" d{i} e") for i in range(40)]
    (length,) = look(rows)["length bias"]
    assert (length.count, length.of) == (30, 40)
    assert length.numbers is not None
    # Wilson 1927 for 30 of 40, calculated by hand: centre (0.75 + 0.0480) / 1.0960, half width 0.1284
    assert length.numbers["interval"] == pytest.approx([0.5981, 0.8581], abs=2e-4)
    assert "is right in 75%" in length.text
    prose.compare("inspection/data_checks: longer replies are chosen", length.text)


def test_overlap_of_splits_is_that_of_prompts_and_of_long_replies() -> None:
    train = clean_rows()
    test = [row(3, " u v w x y.", " short."), row(77, train[5].chosen, " short."), row(78, " z1 z2.", " z3.")]
    found = look(train, test)
    (prompts,), (replies,) = found["overlap of prompts"], found["overlap of replies"]
    assert (prompts.count, prompts.of, prompts.numbers) == (1, 3, {"splits": ["train", "test"]})
    assert (replies.count, replies.of) == (1, 2)  # two of the test's replies have five words
    assert "train 5 and test 1" in replies.examples[0]


def test_phrases_that_tell_the_replies_apart_are_named_once() -> None:
    rows = clean_rows(60)
    rows = [row(i, f" I hope this helps{r.chosen}", r.rejected) if i < 30 else r for i, r in enumerate(rows)]
    found = look(rows)
    (chosen,), (rejected,) = found["phrases of chosen replies"], found["phrases of rejected replies"]
    assert chosen.count == 1  # its parts say no more
    assert "in 30 pairs in the chosen" in chosen.examples[0]
    assert "in 0 in the rejected" in chosen.examples[0]
    prose.compare("inspection/data_checks: a phrase of chosen replies", chosen.text, *chosen.examples)
    assert rejected.count == 0
    (opening,) = found["openings"]
    assert opening.examples == ("i hope this helps: 25.0% of 120 replies",)


def test_a_phrase_that_chance_would_give_is_not_named() -> None:
    sides = ((f" b{i} c{i}", f" yes f{i}") if i % 2 else (f" yes a{i}", f" d{i} e{i}") for i in range(40))
    rows = [row(i, *texts) for i, texts in enumerate(sides)]
    assert look(rows)["phrases of chosen replies"][0].count == 0


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"Q{i}", "chosen": "Say \x1b[31mred\x1b]0;owned\x07 \u202eevil", "rejected": f"No {i}."}
        for i in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, rows)
    return file


def test_hidden_characters_are_written_out(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data", str(hostile)]) == 0
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\u202e"}
    assert "⟨U+001B⟩" in out


def test_too_few_prompts_to_compare_on_are_said_first(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--data", str(hostile), "data.held_out=0.3"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    sizes = [int(n) for n in re.findall(r"(\d+) (?:train|validation|test)", first)]
    assert sum(sizes) == 6
    assert [int(n) for n in re.findall(r"\((\d+) prompts\)", first)] == sizes  # each row has its own
    assert second.startswith("fewer than 10 prompts")


def test_findings_are_data_too(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data", str(hostile), "--json", "-"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    (repeated,) = [r for r in rows if r["kind"] == "repeated replies"]
    assert (repeated["count"], repeated["of"]) == (1, 7)


def test_texts_share_no_prompt() -> None:
    texts = [Preference(prompt=Dialogue(), chosen=f" text {i}", rejected="") for i in range(4)]
    dataset = make_dataset({"train": texts[:2], "validation": [], "test": texts[2:]}, {}, "text")
    assert not [found for found in examine(dataset) if found.kind == "overlap of prompts"]


def test_undesirable_replies_are_looked_at() -> None:
    replies = [row(i, f" a{i} b{i} c{i} d{i} e{i}.", "") for i in range(2)]
    bad = [row(2, "", " f g h i j."), row(3, "", " F g h i j.")]
    splits = {"train": replies[:1], "validation": [], "test": [*replies[1:], row(4, " f g h i j.", "")]}
    dataset = make_dataset(splits, {}, "unpaired", bad)
    findings = examine(dataset)
    (repeated,) = [found for found in findings if found.kind == "repeated replies"]
    assert (repeated.count, repeated.of) == (1, 3)
    (overlap,) = [found for found in findings if found.kind == "overlap of replies"]
    assert (overlap.count, overlap.of) == (1, 2)
    said = [line for line, _ in lines(dataset, findings)]
    assert "2 more of train are undesirable" in "".join(said)
    prose.compare("inspection/data_checks: desirable and undesirable replies", *said)


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["inspect", "tiny", "3", "4"],
        ["inspect", "tiny", "--data", "x"],
        ["inspect", "tiny", "--report"],
        ["inspect", "tiny", f"{'long' * 100}=1"],
    ],
)
def test_what_cannot_be_looked_at_is_wrong_usage(words: list[str]) -> None:
    assert main(["inspect", *words]) == 64


def test_a_file_that_is_not_there_is_66(tmp_path: Path) -> None:
    assert main(["inspect", "--data", str(tmp_path / "none.jsonl")]) == 66


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """As a spreadsheet writes it: a byte order mark, an empty row, columns with names of its own."""
    rows = [f"{i},Question {i}?,Good {i}.,Bad {i}.\n" for i in range(12)]
    file = tmp_path / "rows.csv"
    file.write_text("id,question,good,bad\n" + "".join(rows) + ",,,\n" + rows[3], encoding="utf-8-sig")
    return file


def test_columns_can_be_named_for_a_file_that_is_looked_at(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ["data.columns.chosen=good", "data.columns.rejected=bad"]
    assert main(["inspect", "--data", str(table), *columns]) == 0
    out = capsys.readouterr().out
    assert "preference pairs" in out.splitlines()[0]
    assert "left out: 1 " in out
    assert "duplicates: 1 of 13 rows" in out


def test_columns_that_may_be_replies_are_asked_for(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data", str(table)]) == 0
    out = capsys.readouterr().out
    found = [line for line in out.splitlines() if "columns not read: " in line or "data.columns" in line]
    assert "'bad', 'good', 'id'" in found[0]
    assert "data.columns.chosen=NAME" in found[-1]
    assert "data.columns.rejected=NAME" in found[-1]
    prose.compare("inspection/data_checks: columns that may be replies", *found)
    assert ": human: question 3?" in out  # what is repeated, where there is no reply to show
