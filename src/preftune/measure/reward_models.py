"""How a run's reward models do on pairs that they have not seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preftune.data import Encoder, Preference, first_encoded
from preftune.evaluation.bands import expected_band
from preftune.evaluation.baselines import BagOfWords, fit_bag_of_words
from preftune.evaluation.mistakes import DETAILED, add_token_scores, mistakes
from preftune.evaluation.reward_model import examine, gap, score_pairs
from preftune.evaluation.sanity import ROWS, invariance, sanity_rows
from preftune.measure.conditions import distinct, shares_prompts
from preftune.models.roles import Ensemble, RewardModel
from preftune.runs.roles import keep_rows, share
from preftune.runs.scoring import reward_model_of
from preftune.runs.session import Session
from preftune.seeding import derive_seed
from preftune.training.learner import Learner
from preftune.world.dataset import world_probes
from preftune.world.gold import best_reachable


@dataclass(frozen=True, slots=True, kw_only=True)
class Examiner:
    """A reward stage's model, ready to score pairs."""

    session: Session
    stage: str
    model: RewardModel
    encoder: Encoder
    learner: Learner

    def pair_scores(self, title: str, pairs: Sequence[Preference]) -> list[dict[str, Any]]:
        """Both sides of every pair scored, with a progress bar."""
        size = self.session.config.evaluation.batch_size
        with self.session.console.counting(f"{self.stage} {title}", len(pairs)) as advance:
            return score_pairs(self.model, self.encoder, pairs, size, self.learner.device, advance)


def examiner(session: Session, stage: str) -> Examiner:
    """The reward model of a stage, an implicit one too."""
    learner = session.learner(session.config.evaluation.batch_size)
    model = reward_model_of(session, stage, learner)
    share(model, session.config.shared_blocks())
    return Examiner(
        session=session,
        stage=stage,
        model=model,
        encoder=session.encoder(session.source(stage)),
        learner=learner,
    )


def bag_of_words(session: Session) -> BagOfWords | None:
    """The word-counting baseline, fitted on this run's training pairs; None where its rows are none."""
    if session.dataset.kind != "pairs":
        return None
    return fit_bag_of_words(session.training_rows(), derive_seed(session.config.seed, "bag of words"))


def examine_model(
    by: Examiner, pairs: Sequence[Preference], bag: BagOfWords | None, *, own_data: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The contents of reward_model.json and of the mistakes file. `own_data`: of the run's own data set, for
    which the built-in world knows the best reachable accuracy.
    """
    session, settings, seed = by.session, by.session.config.evaluation, by.session.config.seed
    usable, encoded, rejected = first_encoded(by.encoder, pairs, None)
    keep_rows(session, [by.model], sum(ids.tokens for ids in encoded))  # others read them, too
    scored = by.pair_scores("pairs", usable)
    result: dict[str, Any] = examine(by.stage, scored, seed, bag, settings.resamples)
    result["left_out"] = rejected
    if isinstance(by.model, Ensemble):
        result["combine"] = by.model.in_words
    if rejected:
        session.console.line(f"{by.stage:<12} {sum(rejected.values())} pairs left out: {rejected}")
    device, sample = by.learner.device, session.shuffled(usable)  # of all sources, not of the first file
    result["sanity"] = sanity_rows(
        by.model, by.encoder, distinct(sample, ROWS), settings.batch_size, device, seed, settings.resamples
    )
    result["invariance"] = invariance(by.model, by.encoder, sample, device, result["score"]["sd"])
    if session.is_world and own_data:
        result["best_reachable"] = best_reachable([s["pair"] for s in scored])
        result["gold_component_gaps"] = _gaps(by)
    result["expected_band"] = expected_band(
        str(session.config.data.name) if own_data else "",
        {pair.source for pair in usable},
        by.model.model.num_parameters(),
        result["best_reachable"],
    )
    if by.stage != session.judge:
        shared = shares_prompts(session, by.stage)
        result["held_out"] = None if shared is None else not shared
    rows = mistakes(scored)
    with session.console.counting(f"{by.stage} tokens", min(len(rows), DETAILED)) as advance:
        add_token_scores(rows, scored, by.model, by.encoder, settings.batch_size, device, advance)
    return result, rows


def _gaps(by: Examiner) -> dict[str, Any]:
    """What the reward model sees of each part of the built-in world's gold score."""
    return {
        component: gap(by.pair_scores(component, usable))
        for component, probes in world_probes(by.session.config.seed).items()
        if (usable := by.encoder.usable(probes)[0])
    }
