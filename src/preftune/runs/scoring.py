"""A stage's model as what scores responses: a trained scalar head, or the implicit reward of a policy."""

from collections.abc import Iterable, Sequence
from typing import Any

from preftune.config.rewards import source_hashes
from preftune.data import Encoder, Preference
from preftune.models.load import load_causal_lm
from preftune.models.locate import fingerprint, locate
from preftune.models.roles import ImplicitReward, RewardModel
from preftune.rollout.score import Scorer, same_vocabulary
from preftune.runs.save import load_reward_model, normalisation
from preftune.runs.session import Session
from preftune.runs.standalone import encoder_of
from preftune.training.learner import Learner


def reward_model_of(session: Session, stage: str, learner: Learner) -> RewardModel:
    """Frozen and placed by the learner, normalised to mean 0 and sd 1 over chosen training responses."""
    config, source = session.config.stage[stage], session.source(stage)
    beta = config.implicit_beta()
    if beta is None:
        model = load_reward_model(source)
        learner.freeze(model)
        return model
    reference = load_causal_lm(session.source(config.reference_stage))
    implicit = ImplicitReward(load_causal_lm(source), reference, beta)
    learner.freeze(implicit)
    rows = session.training_rows(stage=stage)
    implicit.mean, implicit.std = normalisation(implicit, session.encoder(source), rows)
    return implicit


def scorer_from(
    directory: str, encoder: Encoder, learner: Learner, rows: Sequence[Preference], batch_size: int
) -> Scorer:
    """What scores responses by a reward model's directory, whoever made it: its tokenizer and its form may be
    others than the policy's. `rows` are those that prompts come from.
    """
    source = locate(directory)
    model = load_reward_model(source)
    learner.freeze(model)
    theirs = encoder_of(source, "plain" if encoder.form == "plain" else "transcript")
    same = theirs.form == encoder.form and same_vocabulary(encoder, theirs)
    translate = None if same else theirs
    return Scorer(reward_model=model, encoder=encoder, translate=translate, batch_size=batch_size, rows=rows)


def judge_hashes(judges: Iterable[str]) -> dict[str, Any]:
    """What the scores of judges depend on: the files of functions, or the weights of a directory."""
    return {j: source_hashes(j) if ":" in j else fingerprint(locate(j)) for j in judges}
