"""Transcripts into prompt, chosen and rejected: by the table, by property, and on every real row."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import Dialogue, RejectedRow, Turn, parse_prompt, split_pair
from preftune.data.hh import MARKER, REASONS, parse_transcript, split_turns

P = "\n\nHuman: Hi\n\nAssistant:"


def test_prompt_is_everything_up_to_the_last_assistant_marker() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    pair = split_pair(start + " Because it is.", start + " Because I say so.")
    assert pair.prompt == (Turn("human", " Hi"), Turn("assistant", " Hello"), Turn("human", " Why?"))
    assert pair.prompt.transcript() == str(pair.prompt) == start
    # "Because" is common to both and still belongs to the responses.
    assert (pair.chosen, pair.rejected) == (" Because it is.", " Because I say so.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Hello", P + " a", "no_roles"),
        ("", "", "no_roles"),
        ("\nHuman: Hi\nAssistant: a", "\nHuman: Hi\nAssistant: b", "no_roles"),
        ("Note" + P + " a", "Note" + P + " b", "text_before_roles"),
        (P + " a\n\nHuman: more", P + " b", "ends_on_human"),
        (P + " a", P + " b\n\nHuman:", "ends_on_human"),
        (P + " a\n\nAssistant: c", P + " b", "diverges_early"),
        (P + " a\n\nHuman: x\n\nAssistant: c", P + " b\n\nHuman: x\n\nAssistant: c", "diverges_early"),
        ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Ho\n\nAssistant: b", "diverges_early"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "empty_prompt"),
        (P + " ", P + " b", "empty_response"),
        (P + " a", P, "empty_response"),
        (P + " a", P + "  a\n", "identical"),
    ],
)
def test_unusable_pairs_are_rejected_with_a_reason(chosen: str, rejected: str, reason: str) -> None:
    with pytest.raises(RejectedRow) as caught:
        split_pair(chosen, rejected)
    assert caught.value.reason == reason
    assert caught.value.hint == REASONS[reason]


def test_shared_neighbours_of_one_role_are_kept() -> None:
    start = "\n\nHuman: Hi\n\nHuman: Still there?\n\nAssistant: Yes.\n\nAssistant:"
    pair = split_pair(start + " Go on.", start + " Bye.")
    assert [turn.role for turn in pair.prompt] == ["human", "human", "assistant"]
    assert pair.prompt.transcript() == start


def test_normalizing_touches_only_the_ends_of_responses() -> None:
    chosen, rejected = "\n\nHuman:  Hi \n\nAssistant:  one\n two \n", "\n\nHuman:  Hi \n\nAssistant:three"
    pair = split_pair(chosen, rejected)
    assert (pair.chosen, pair.rejected) == (" one\n two", " three")
    assert pair.prompt[0].text == "  Hi "
    exact = split_pair(chosen, rejected, normalize=False)
    assert exact.prompt.transcript() + exact.chosen == chosen
    assert exact.prompt.transcript() + exact.rejected == rejected


def test_a_leading_assistant_marker_is_never_made_up() -> None:
    # The replaced pipeline glued "\n\nAssistant: " before whole transcripts.
    pair = split_pair(P + " a", P + " b")
    assert pair.prompt.transcript().startswith("\n\nHuman:")
    assert pair.prompt.transcript().count("Assistant:") == 1


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("What is 2 + 2?", [("human", " What is 2 + 2?")]),
        ("\n\nHuman: Hi\n\nAssistant:", [("human", " Hi")]),
        ("\n\nHuman: Hi", [("human", " Hi")]),
        ("Human: Hi\n\nAssistant: ", [("human", "Hi")]),
    ],
)
def test_prompts_given_as_text(text: str, turns: list[tuple[str, str]]) -> None:
    assert [(turn.role, turn.text.strip()) for turn in parse_prompt(text)] == [
        (r, t.strip()) for r, t in turns
    ]


@pytest.mark.parametrize(
    ("text", "reason"), [("  ", "empty_prompt"), (P + " So", "prompt_ends_on_assistant")]
)
def test_prompts_that_cannot_be_used(text: str, reason: str) -> None:
    with pytest.raises(RejectedRow, match=reason):
        parse_prompt(text)


texts = st.text(st.characters(codec="utf-8"), max_size=30).filter(
    # glued to a marker, a text that ends in part of one would move it
    lambda text: not MARKER.search(f"\n\nHuman:{text}\n\nHuman:", 1, len(text) + 12)
)
turns = st.lists(st.builds(Turn, st.sampled_from(["human", "assistant"]), texts), min_size=1, max_size=5)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(turns)
def test_parse_undoes_compose(said: list[Turn]) -> None:
    assert parse_transcript(Dialogue(said).transcript()) == (*said, Turn("assistant", ""))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(turns, texts, texts)
def test_split_undoes_joining(said: list[Turn], good: str, bad: str) -> None:
    prompt = Dialogue(said).transcript()
    try:
        pair = split_pair(prompt + good, prompt + bad, normalize=False)
    except RejectedRow as error:
        assert error.reason in {"empty_prompt", "empty_response", "identical"}  # noqa: PT017
    else:
        assert (pair.prompt, pair.chosen, pair.rejected) == (Dialogue(said), good, bad)
        again = split_turns([*said, Turn("assistant", good)], [*said, Turn("assistant", bad)])
        assert again.chosen == " " + good.strip()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(), st.text())
def test_any_text_is_split_or_rejected(chosen: str, rejected: str) -> None:
    with pytest.raises(RejectedRow):
        split_pair(chosen, rejected)


def test_every_real_row_round_trips_or_is_rejected_for_a_known_reason(hh_directory: Path) -> None:
    counts: Counter[str] = Counter()
    for path in sorted(hh_directory.rglob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for row in map(json.loads, lines):
                try:
                    pair = split_pair(row["chosen"], row["rejected"], normalize=False)
                except RejectedRow as error:
                    counts[error.reason] += 1
                    continue
                counts["kept"] += 1
                prompt = pair.prompt.transcript()
                assert prompt.endswith("\n\nAssistant:")
                assert prompt.startswith("\n\nHuman:")
                assert prompt + pair.chosen == row["chosen"]
                assert prompt + pair.rejected == row["rejected"]
    assert counts == {
        "kept": 14379, "diverges_early": 31, "identical": 28, "empty_response": 17, "ends_on_human": 1
    }  # fmt: skip
