"""What scores responses: a scalar head, the implicit reward of a policy, a judge from elsewhere."""

from preftune.config import from_outside
from preftune.data import Encoder
from preftune.data.encode import UNLIMITED
from preftune.models.load import context_length, declared_ends, load_causal_lm, load_tokenizer
from preftune.models.roles import ImplicitReward, RewardModel
from preftune.runs.save import load_reward_model, normalisation, read_side_file
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
    implicit = ImplicitReward(
        load_causal_lm(source), load_causal_lm(session.source(session.config.stage[stage].init)), beta
    )
    learner.freeze(implicit)
    rows = session.training_rows(stage=stage)
    implicit.mean, implicit.std = normalisation(implicit, session.encoder(source), rows)
    return implicit


def _measure_unit(session: Session, judge: str, model: RewardModel) -> None:
    """Mean and sd of a judge that states none, over chosen training responses, if there are any."""
    if session.dataset.kind not in ("pairs", "unpaired"):
        session.console.line(
            f"{judge}: it states no mean and sd, and the data has no replies to measure them on: its "
            "scores are taken as they are; missing_eos_score and kl_coef are in their unit"
        )
        return
    rows = session.shuffled(session.dataset.train)
    model.mean, model.std = normalisation(model, judge_encoder(session, judge), rows)
    session.console.line(
        f"{judge}: it states no mean and sd; measured over chosen training replies: "
        f"{model.mean:.4g} and {model.std:.4g}"
    )


def judge_encoder(session: Session, stage: str) -> Encoder:
    """How the judge reads text. One from elsewhere: in the form that its preftune.json states, else in its
    own chat template, if it has one; whole replies, up to its context.
    """
    source = session.source(stage)
    if not from_outside(stage):
        return session.encoder(source)
    tokenizer, side = load_tokenizer(source), read_side_file(source)
    context = context_length(source) or UNLIMITED
    return Encoder(
        tokenizer,
        side.get("form") or ("chat" if tokenizer.chat_template else "transcript"),
        max_prompt_length=context,
        max_response_length=context,
        max_length=context,
        ends=declared_ends(source),
        template_arguments=side.get("template_arguments", {}),
    )
