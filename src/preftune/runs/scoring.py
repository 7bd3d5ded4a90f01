"""A stage's model as what scores responses: a trained scalar head, or the implicit reward of a policy."""

from preftune.models.load import load_causal_lm
from preftune.models.roles import ImplicitReward, RewardModel
from preftune.runs.save import load_reward_model, normalisation
from preftune.runs.session import Session
from preftune.training.learner import Learner


def reward_model_of(session: Session, stage: str, learner: Learner) -> RewardModel:
    """Frozen and placed by the learner, normalised to mean 0 and sd 1 over chosen training responses."""
    config, source = session.config.stage[stage], session.source(stage)
    beta = config.implicit_beta()
    if beta is None:
        model = load_reward_model(source)
        learner.freeze(model)
        return model
    implicit = ImplicitReward(load_causal_lm(source), load_causal_lm(session.source(config.init)), beta)
    learner.freeze(implicit)
    rows = session.training_rows(stage=stage)
    implicit.mean, implicit.std = normalisation(implicit, session.encoder(source), rows)
    return implicit
