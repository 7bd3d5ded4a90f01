"""Linear probes: what the states of the pretrained model say about a pair before anything is trained.

The states are those below the blocks that the recipe hh-rm trains, as its runs keep them on disk: a forward
pass for a pair that none has read yet. A reply is the mean of the states of its tokens, in units of their
spread; a margin is linear in the difference (logistic regression; Alain and Bengio, arXiv:1610.01644).
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from hh_rm_rules import Scores, harmless, held_for_choice, logistic

from preftune.config import RunConfig, load_recipe
from preftune.data import Encoder, Preference
from preftune.data.batch import PairIds, concatenate, pad_pairs
from preftune.evaluation.calibration import nll
from preftune.models.fast.support import rows_below
from preftune.models.fast.trunk import branch_of
from preftune.models.load import context_length, declared_ends, load_tokenizer, quiet_libraries
from preftune.models.locate import locate
from preftune.models.scalar import init_scalar_model
from preftune.models.trunk import keep_on_disk, share_trunk

BATCH = 16  # pairs a pass
PENALTIES = (0.0001, 0.0003, 0.001, 0.003, 0.01)
KIND_C = 0.01  # of the guess of the kind


class States(NamedTuple):
    """Of a pair: the mean over each reply, chosen and rejected (2, d), and the prompt's last state (d,)."""

    replies: np.ndarray
    prompt: np.ndarray


class Features:
    """The difference of two replies' states in units of their spread among `pairs`, (n, d). `by_prompt`:
    shared out between harmless and helpful by what the prompt's state says of the kind, (n, 2d), so that each
    has weights of its own and it sees what a reward model sees.
    """

    def __init__(self, pairs: Sequence[Preference], by_prompt: bool) -> None:
        from sklearn.linear_model import LogisticRegression

        replies, prompts = stacked(pairs)
        self.spread = replies.std((0, 1)) + 1e-6
        self.kind: LogisticRegression | None = None
        if by_prompt:
            self.prompt_centre, self.prompt_spread = prompts.mean(0), prompts.std(0) + 1e-6
            self.kind = LogisticRegression(C=KIND_C, max_iter=1000)
            self.kind.fit(self._standard(prompts), [harmless(pair) for pair in pairs])

    def __call__(self, pairs: Sequence[Preference]) -> np.ndarray:
        replies, prompts = stacked(pairs)
        difference = (replies[:, 0] - replies[:, 1]) / self.spread
        if self.kind is None:
            return difference
        share = self.kind.predict_proba(self._standard(prompts))[:, 1:]
        return np.hstack([difference * (1 - share), difference * share])

    def _standard(self, prompts: np.ndarray) -> np.ndarray:
        return (prompts - self.prompt_centre) / self.prompt_spread


def probe(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """One probe for all pairs."""
    return _fitted(pairs, by_prompt=False)


def probe_by_prompt(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """Two, mixed by the prompt."""
    return _fitted(pairs, by_prompt=True)


def _fitted(pairs: Sequence[Preference], *, by_prompt: bool) -> tuple[Scores, dict[str, Any]]:
    """A probe of all pairs with the penalty that is best on the tenth."""
    held = [pair for pair in pairs if held_for_choice(pair)]
    rest = [pair for pair in pairs if not held_for_choice(pair)]
    features = Features(rest, by_prompt)
    x, y = features(rest), features(held)
    losses = {c: float(nll(y @ logistic(x, c)).mean()) for c in PENALTIES}
    c = min(losses, key=lambda c: losses[c])
    features = Features(pairs, by_prompt)
    weights = logistic(features(pairs), c)
    return lambda of: features(of) @ weights, {"C": c, "loss": losses[c], "held": len(held)}


def stacked(pairs: Sequence[Preference]) -> tuple[np.ndarray, np.ndarray]:
    """States of n pairs: replies (n, 2, d), prompts (n, d)."""
    states = lower_blocks().of(pairs)
    return np.stack([each.replies for each in states]), np.stack([each.prompt for each in states])


class LowerBlocks:
    """The blocks of the base that hh-rm leaves as they are, read in bf16 as its runs read them."""

    def __init__(self, config: RunConfig) -> None:
        data, top = config.data, config.shared_blocks()
        source = locate(config.model.base)
        tokenizer = load_tokenizer(source)
        context = context_length(source)
        assert top is not None
        self.encoder = Encoder(
            tokenizer,
            data.form,
            max_prompt_length=min(data.max_prompt_length, context - 1),
            max_response_length=data.max_response_length,
            max_length=context,
            ends=declared_ends(source),
        )
        self.model = init_scalar_model(source, tokenizer, seed=0, scale=0.0)
        share_trunk(self.model, top)
        self.settings = config.model
        self._read: dict[Preference, States] = {}

    def of(self, pairs: Sequence[Preference]) -> list[States]:
        missing = [pair for pair in pairs if pair not in self._read]
        readable = told_apart(self.encoder, missing)
        limit = int(self.settings.kept_gb * 1e9)
        keep_on_disk(self.model, tokens_of(readable), limit, self.settings.kept_dtype, print)
        for start in range(0, len(readable), BATCH):
            batch = readable[start : start + BATCH]
            states = self._pass([ids for _, ids in batch])
            self._read |= {pair: each for (pair, _), each in zip(batch, states, strict=True)}
        none = States(np.zeros((2, self._width), np.float32), np.zeros(self._width, np.float32))
        return [self._read.setdefault(pair, none) for pair in pairs]

    @property
    def _width(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def _pass(self, pairs: Sequence[PairIds]) -> list[States]:
        branch = branch_of(self.model)
        assert branch is not None
        batch = pad_pairs(pairs, self.encoder.pad_id)
        both = concatenate(batch.chosen, batch.rejected)
        with torch.autocast("cpu", torch.bfloat16):
            rows = branch.trunk.rows(
                both.ids, both.attention, lambda *rows: rows_below(self.model, branch.cut, *rows)
            )
        branch.trunk.forget()
        found = []
        for i, ids in enumerate(pairs):
            sides = [rows[i + side * len(pairs)] for side in (0, 1)]
            states = [row.states[row.state_index].float().numpy() for row in sides]
            replies = np.stack([each[len(ids.prompt) :].mean(0) for each in states])
            found.append(States(replies, states[0][len(ids.prompt) - 1].copy()))
        return found


def told_apart(encoder: Encoder, pairs: Sequence[Preference]) -> list[tuple[Preference, PairIds]]:
    """The pairs whose replies differ as far as a model reads them, with their ids. SystemExit for a pair that
    it cannot read at all.
    """
    rejected = Counter[str]()
    readable = list(encoder.encoded(pairs, rejected))
    if rejected.keys() - {"response_too_long_became_equal"}:
        raise SystemExit(f"pairs cannot be encoded: {dict(rejected)}")
    return readable


def tokens_of(readable: Sequence[tuple[Preference, PairIds]]) -> int:
    """Tokens of both rows of all pairs."""
    return sum(ids.tokens for _, ids in readable)


@cache
def lower_blocks() -> LowerBlocks:
    quiet_libraries()
    return LowerBlocks(load_recipe("hh-rm", ["data.name=any"]).config)
