"""Samples and mistakes as cards: what they can be filtered by, what is shaded, how many fit on a page."""

import math
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run
from synthetic_newer import add_newer_parts

from preftune.report import load_run
from preftune.report.blocks import Explorer
from preftune.report.contents import sections
from preftune.report.sections.explorers import MISTAKE_BYTES, SAMPLE_BYTES, mistakes, samples
from preftune.report.shades import level, scale_of
from preftune.report.text import MAX_QUOTE
from preftune.report.writers.page import page_text
from preftune.rundir import RunDir, read_jsonl, write_jsonl

MEGABYTE = 1_000_000


def edit(run: RunDir, path: Path, **keys: Any) -> None:
    write_jsonl(path, [row | keys for row in read_jsonl(path)])


def test_a_sample_card_holds_every_policy_and_its_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run.samples_file("policy_ppo")
    rows = read_jsonl(path)
    write_jsonl(path, [rows[0] | {"score": math.nan}, *rows[2:]])  # one score unknown, one response missing
    explorer, total = samples(load_run(run))
    assert (len(explorer.cards), total) == (20, 20)
    labels = ("base (gpt2)", "SFT", "PPO", "GRPO", "DPO", "best of 4 (SFT)")
    assert explorer.measures == labels
    first, second = explorer.cards[:2]
    assert [passage.label for passage in first.passages] == ["Prompt", *labels]
    assert first.values[2] is None
    assert first.values[1] == read_jsonl(run.samples_file("policy_sft"))[0]["score"]
    assert [passage.label for passage in second.passages] == [
        "Prompt",
        *(one for one in labels if one != "PPO"),
    ]
    assert second.values[2] is None
    assert first.lead == "Question 0: I can help with that."


def test_mistakes_come_surest_first_and_can_be_filtered_by_tag_and_source(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_jsonl(run.mistakes, reversed(read_jsonl(run.mistakes)))
    explorer = mistakes(load_run(run))
    assert [card.title for card in explorer.cards[:2]] == ["Validation row 40", "Validation row 41"]
    assert explorer.cards[0].values == (pytest.approx(0.9525741),)  # 1 / (1 + e^-3)
    assert explorer.tags == (
        ("rejected is longer", 6),
        ("rejected is shorter", 6),
        ("very short", 6),
        ("source: harmless-base", 12),
    )
    assert explorer.cards[0].tags == (1, 2, 3)


def shades(tokens: list[list[Any]], tmp_path: Path) -> tuple[tuple[str, int], ...]:
    run = make_run(tmp_path)
    rows = read_jsonl(run.mistakes)
    text = "".join(token[0] for token in tokens)
    write_jsonl(run.mistakes, [rows[0] | {"chosen": text, "tokens_chosen": tokens}])
    return mistakes(load_run(run)).cards[0].passages[1].shades


def test_shades_show_what_each_token_did_and_join_neighbours(tmp_path: Path) -> None:
    tokens = [["a", 5.0], [" b", 6.0], [" c", 7.0], [" d", 6.5], [" e", 6.5], [" f", 2.5]]
    # The first has nothing to be compared with. Changes +1 +1 -0.5 0 -4; the scale is the largest of six: 4.
    assert shades(tokens, tmp_path) == (("a", 0), (" b c", 1), (" d e", 0), (" f", -4))


def test_a_shaded_text_is_cut_like_any_other(tmp_path: Path) -> None:
    found = shades([["x" * 1000, 0.0], ["y" * 500, 1.0], ["z", 0.0]], tmp_path)
    assert found == (("x" * 1000, 0), ("y" * (MAX_QUOTE - 1000), 4), (" … (301 more characters)", 0))


def test_tokens_without_a_number_are_text_without_a_shade(tmp_path: Path) -> None:
    assert shades([["a", math.nan], [" b", None], [" c", 1.0]], tmp_path) == (("a b c", 0),)


def test_what_is_no_number_has_no_shade() -> None:
    assert scale_of([math.nan, 2.0, math.nan, 1.0]) == 2.0
    assert [level(value, 2.0) for value in (math.nan, -math.inf, 2.0)] == [0, -4, 4]


def test_a_shaded_text_is_cleaned(tmp_path: Path) -> None:
    assert shades([["\x1b[31m", 0.0], ["‮x", 0.0]], tmp_path) == (("⟨U+001B⟩[31m⟨U+202E⟩x", 0),)


@pytest.mark.parametrize("words", ["plain words ", "<&\"'", "雪"])
def test_cards_stop_before_the_page_is_too_large_and_say_so(tmp_path: Path, words: str) -> None:
    run = add_newer_parts(make_run(tmp_path, text=words * 400))
    for policy in ("base", "policy_sft", "policy_ppo"):
        path = run.samples_file(policy, "gpt2")
        rows = [
            row | {"prompt": f"Human: {place}\n\nAssistant:"}
            for place in range(400)
            for row in read_jsonl(path)[:1]
        ]
        write_jsonl(path, rows)
    (mistake,) = read_jsonl(run.mistakes)[:1]
    bare = {key: value for key, value in mistake.items() if not key.startswith("tokens_")}
    write_jsonl(run.mistakes, [(mistake if place < 200 else bare) | {"idx": place} for place in range(1000)])
    view = load_run(run)
    page = page_text(view, sections(view, {}), {})
    assert len(page.encode()) < 2.3 * MEGABYTE  # figures come to it
    prompts, wrong = samples(view)[0], mistakes(view)
    for explorer, budget in ((prompts, SAMPLE_BYTES), (wrong, MISTAKE_BYTES)):
        assert rendered(page, explorer) < budget
    assert f"This page holds the first {len(prompts.cards)} of 420 prompts." in page
    assert f"This page holds the first {len(wrong.cards)}." in page


def rendered(page: str, explorer: Explorer) -> int:
    """Bytes that the cards of an explorer take in the page."""
    part = page.split(f'id="{explorer.key}-explorer"')[1].split("</section>")[0]
    cards = part.partition("<details")[2]
    return len(cards.encode())
