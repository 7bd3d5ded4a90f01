"""Mistakes: their order, their tags, and the score token by token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from preftune.data import Dialogue, Pairs, Preference, Turn
from preftune.evaluation.mistakes import add_token_scores, in_order, mistakes, tag_counts, tags
from preftune.models.roles import RewardModel
from tiny import EOS, classifier, pairs


def scored(chosen: str, rejected: str, margin: float, row: int = 0, **more: Any) -> dict[str, Any]:
    prompt = Dialogue((Turn("human", " Hello"),))
    pair = Preference(prompt=prompt, chosen=chosen, rejected=rejected, row=row)
    lengths = {"chosen_length": len(chosen.split()), "rejected_length": len(rejected.split())}
    return {"pair": pair, "chosen": margin, "rejected": 0.0, **lengths, **more}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (scored(" a b c d", " e f g h", 0.0), {"tie"}),
        (scored(" a b c d", " e f g h i", -1), {"rejected is longer"}),
        (scored(" a b c d e", " f g h i", -1), {"rejected is shorter"}),
        (scored(" I cannot do that", " w x y z", -1), {"chosen refuses"}),
        (scored(" w x y z", " I'm sorry , no", -1), {"rejected refuses"}),
        (scored(" I cannot say more", " no I won't tell", -1), {"both refuse"}),
        (scored(" a b c d e f", " f e d c b a", -1), {"nearly the same words"}),
        (scored(" a b c d e f g", " a b c d u v w", -1), {"starts the same"}),
        (scored(" yes", " w x y z", -1), {"very short", "rejected is longer"}),
        (scored(" a b c d", " e f g h", -1, chosen_truncated=True), {"chosen truncated"}),
        (scored(" a b c d", " e f g h", -1, rejected_truncated=True), {"rejected truncated"}),
    ],
)
def test_tags_say_what_a_pair_looks_like(record: dict[str, Any], expected: set[str]) -> None:
    assert set(tags(record)) == expected


def test_mistakes_come_surest_first_and_right_pairs_not_at_all() -> None:
    rows = [scored(" a b c d", " e f g h", m, i) for i, m in enumerate((0.5, -0.1, -2.0, 0.0))]
    found = mistakes(rows)
    assert [row["idx"] for row in found] == [2, 1, 3]
    assert found[0]["confidence"] == pytest.approx(0.8808, abs=1e-4)  # σ(2)
    assert found[2]["confidence"] == 0.5


def test_tags_are_counted_among_mistakes_and_among_all_pairs() -> None:
    longer, same = (" a b c d", " e f g h i"), (" a b c d", " e f g h")
    rows = [scored(*longer, m) for m in (-1, -1, 1)] + [scored(*same, m) for m in (-1, 1)]
    found = tag_counts(rows)
    assert set(found) == {"rejected is longer"}
    record = found["rejected is longer"]
    assert (record["mistakes"], record["pairs"]) == (2, 3)
    assert record["share"] == pytest.approx(2 / 3)
    assert record["share_of_pairs"] == pytest.approx(3 / 5)
    assert record["error_rate"]["value"] == pytest.approx(2 / 3)
    thrice = tag_counts([row for row in rows for _ in range(3)], np.repeat(np.arange(5), 3))
    assert thrice["rejected is longer"]["error_rate"]["n"] == 9
    assert thrice["rejected is longer"]["error_rate"]["interval"] == pytest.approx(
        record["error_rate"]["interval"]
    )  # three prompts, however many pairs each has


def test_the_last_token_score_is_the_score() -> None:
    """Read at every response position of a padded batch; rows are matched to their mistakes by order."""
    model, batch = RewardModel(classifier(3)), pairs(2, 6)
    with torch.no_grad():
        sides = [model.raw_scores(side).tolist() for side in (batch.chosen, batch.rejected)]
    rows = [
        scored(" a b c d", " e f g h", 0, i) | {"chosen": c, "rejected": r}
        for i, (c, r) in enumerate(zip(*sides, strict=True))
    ]

    def encoded(some: list[Preference]) -> Pairs:
        return batch[torch.tensor([pair.row for pair in some])]

    tokenizer = SimpleNamespace(decode=lambda ids, **_: f"<{ids[0]}>")
    encoder: Any = SimpleNamespace(pairs=encoded, tokenizer=tokenizer)
    found = mistakes(rows)
    assert 0 < len(found) < 6
    add_token_scores(found, rows, model, encoder, 2, torch.device("cpu"), lambda n: None)
    for row, source in zip(found, in_order(rows), strict=True):
        assert row["idx"] == source["pair"].row
        assert row["tokens_chosen"][-1][1] == pytest.approx(row["reward_chosen"], abs=1e-5)
        assert row["tokens_rejected"][-1][1] == pytest.approx(row["reward_rejected"], abs=1e-5)
        own = batch.chosen.ids[row["idx"]][batch.chosen.response[row["idx"]]].tolist()
        assert [text for text, _ in row["tokens_chosen"]] == [f"<{i}>" for i in own]
    assert any(row["tokens_chosen"][-1][0] == f"<{EOS}>" for row in found)
