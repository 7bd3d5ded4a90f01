"""The models that an algorithm needs, by the part that each plays."""

from collections.abc import Callable, Iterable
from typing import Any

from preftune.algorithms import Algorithm
from preftune.config import StageSettings, from_outside
from preftune.config.trainable import LORA, top_blocks
from preftune.errors import PreftuneError
from preftune.models.adapter import adapt, hold_once
from preftune.models.load import load_causal_lm, load_tokenizer
from preftune.models.roles import (
    Critic,
    ImplicitReward,
    Policy,
    Reference,
    RewardModel,
    Role,
    models_of,
    quantise_role,
)
from preftune.models.scalar import init_scalar_model
from preftune.models.trunk import keep_on_disk, keep_states, share_trunk
from preftune.runs.save import load_first_scalar
from preftune.runs.session import Session
from preftune.seeding import derive_seed


def make_roles(
    session: Session, name: str, kind: type[Algorithm], tokenizer: Any, judge: RewardModel | None
) -> dict[str, Role]:
    """Fresh models for every role in `kind.needs`, from the model that the stage starts from.

    A reward model that is trained gets a new head; one that is only asked is `judge`, the stage's own.
    """
    config = session.config.stage[name]
    source = session.source(config.init)

    def reward_model() -> RewardModel:
        if "reward_model" in kind.trains:
            seed = derive_seed(session.config.seed, name, "head")
            new = init_scalar_model(source, tokenizer, seed, config.head.scale)
            return RewardModel(new, pooling=config.head.pooling)
        if judge is None:
            raise PreftuneError(f"{config.algorithm} asks a reward model, and stage {name} names none")
        return judge

    top = top_blocks(session.config.trainable_of(name))
    roles: dict[str, Role] = {}
    makers: dict[str, Callable[[], Role]] = {
        "policy": lambda: Policy(load_causal_lm(source)),
        "reference": lambda: Reference(load_causal_lm(session.source(config.reference_stage))),
        "reward_model": reward_model,
        "critic": lambda: critic_of(session, config, judge),
    }
    for role in kind.needs:
        roles[role] = makers[role]()
        share(roles[role], top)
    if judge is not None and not from_outside(config.scored_by or ""):
        share(judge, top)
    if session.config.trainable_of(name) == LORA:
        _adapt(session, name, {role: roles[role] for role in kind.trains}, roles.values(), judge)
    for role in roles.values():
        for model in models_of(role):
            # DPO asks its reference once in a run: a row's states must not depend on whether that was now.
            keep_states(model, config.online or config.epochs == 1)
    return roles


def _adapt(
    session: Session, name: str, trained: dict[str, Role], roles: Iterable[Role], judge: Role | None
) -> None:
    """Adapters for what is trained, on one copy of what all roles have in common. A judge that is only asked
    is not quantised: the evaluation reads its scores, too.
    """
    lora = session.config.model.lora
    inner = [role for role in roles if role is not judge]
    for role in inner if lora.quantize != "none" else ():
        quantise_role(role)
    for role, adapted in trained.items():
        adapt(adapted.model, lora.rank, lora.alpha, derive_seed(session.config.seed, name, role, "adapter"))
    read_only = [judge] if judge is not None else []
    hold_once([model for role in [*inner, *read_only] for model in models_of(role)])


def share(role: Role, top: int | None) -> None:
    """Where only the upper `top` blocks are trained, all roles with the same blocks below share those."""
    if top is not None:
        for model in models_of(role):
            share_trunk(model, top)


def keep_rows(session: Session, roles: Iterable[Role], tokens: int) -> None:
    """States of `tokens` tokens of fixed rows, which will be seen again, are kept on disk."""
    settings = session.config.model
    for model in (model for role in roles for model in models_of(role)) if tokens else ():
        limit = int(settings.kept_gb * 1e9)
        keep_on_disk(model, tokens, limit, settings.kept_dtype, session.console.line)


def critic_of(session: Session, config: StageSettings, reward_model: RewardModel | None) -> Critic:
    """Backbone and head of the reward model (Stiennon et al., arXiv:2009.01325), of an ensemble those of its
    first member. Without a scalar head, or with a judge from elsewhere, which may read other tokens: the
    policy's backbone and a head of zeros, so that the first values are 0 and say nothing wrong.
    """
    scalar = None if isinstance(reward_model, ImplicitReward) else reward_model
    if scalar is not None and config.scored_by is not None and not from_outside(config.scored_by):
        return Critic(*load_first_scalar(session.source(config.scored_by)))
    source = session.source(config.init)
    return Critic(init_scalar_model(source, load_tokenizer(source), seed=0, scale=0.0))
