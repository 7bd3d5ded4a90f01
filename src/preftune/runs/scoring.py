"""What scores responses: a scalar head, the implicit reward of a policy, a judge from elsewhere."""

from collections.abc import Iterable
from typing import Any

from preftune.config import from_outside
from preftune.config.rewards import source_hashes
from preftune.data import Encoder
from preftune.models.load import load_causal_lm
from preftune.models.locate import Source, fingerprint, locate
from preftune.models.roles import ImplicitReward, RewardModel
from preftune.runs.outside import encoder_of, reading_of
from preftune.runs.save import first_replies, load_reward_model, normalisation, normalised, read_side_file
from preftune.runs.session import Session
from preftune.training.learner import Learner


def reward_model_of(session: Session, stage: str, learner: Learner) -> RewardModel:
    """Frozen and placed by the learner, normalised to mean 0 and sd 1 over chosen training responses."""
    source = session.source(stage)
    beta = None if from_outside(stage) else session.config.stage[stage].implicit_beta()
    if beta is None:
        model = load_reward_model(source)
        learner.freeze(model)
        if from_outside(stage) and "mean" not in read_side_file(source):
            _measure_unit(session, stage, model)
        return model
    settings = session.config.stage[stage]
    pair = load_causal_lm(source), load_causal_lm(session.source(settings.reference_stage))
    implicit = ImplicitReward(*pair, beta, averaged=settings.implicit_average)
    learner.freeze(implicit)
    implicit.mean, implicit.std = normalised(session, stage, implicit, session.encoder(source))
    return implicit


def _measure_unit(session: Session, judge: str, model: RewardModel) -> None:
    """Mean and sd of a judge that states none, over chosen training responses, if there are any."""
    if session.dataset.kind not in ("pairs", "unpaired"):
        session.console.line(
            f"{judge}: it states no mean and sd, and the data has no replies to measure them on: its "
            "scores are taken as they are; missing_eos_score and kl_coef are in their unit"
        )
        return
    encoder = judge_encoder(session, judge)
    rows = first_replies(encoder, session.shuffled(session.dataset.train))
    model.mean, model.std = normalisation(model, encoder, rows)
    session.console.line(
        f"{judge}: it states no mean and sd; measured over chosen training replies: "
        f"{model.mean:.4g} and {model.std:.4g}"
    )


def judge_encoder(session: Session, stage: str) -> Encoder:
    """How the judge reads text: as its stage does, or as `encoder_of` says of one from elsewhere."""
    source = session.source(stage)
    if from_outside(stage):
        return encoder_of(source, read_side_file(source), judge=True)
    return session.encoder(source)


def judge_hashes(judges: Iterable[str]) -> dict[str, Any]:
    """What the scores of judges depend on: the files of functions, or the weights of a directory."""
    return {j: source_hashes(j) if ":" in j else _content(locate(j)) for j in judges}


def _content(source: Source) -> Any:
    reading = reading_of(source)
    return {"sha256": fingerprint(source), **reading} if reading else fingerprint(source)
