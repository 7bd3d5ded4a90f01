"""Replies of a run's policies on demand."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preftune.data import Dialogue, Turn
from preftune.errors import InputMissing, UsageError, no_bare_text, one_of
from preftune.measure.conditions import held_out_prompts
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy
from preftune.rollout.sample import ended, sample
from preftune.rundir import BASE
from preftune.runs.session import Session
from preftune.seeding import derive_seed


def check_policy(session: Session, stage: str) -> None:
    """UsageError if no such stage trains a policy, InputMissing if it is not trained yet."""
    policies = [name for name, s in session.config.stage.items() if s.trains_policy]
    if stage != BASE and stage not in policies:
        raise UsageError(f"no policy {stage!r}", one_of(stage, [BASE, *policies]))
    if not session.is_trained(stage):
        raise InputMissing(
            f"{stage} is not trained yet in {session.run.path}", hint="preftune train RECIPE STAGE trains it"
        )


def replies(
    session: Session, stage: str, prompts: Sequence[str], seed: int, n: int, changes: Mapping[str, Any] = {}
) -> Iterator[dict[str, Any]]:
    """One reply to each prompt, or to `n` held-out prompts if none is given. `changes`: to the evaluation's
    settings.
    """
    no_bare_text("prompts", prompts)
    if n < 0:
        raise UsageError(f"n = {n}: there is no such number of prompts")
    check_policy(session, stage)
    source, settings = session.source(stage), session.config.evaluation.model_copy(update=changes)
    dialogues = [Dialogue((Turn("human", f" {text.strip()}"),)) for text in prompts]
    dialogues = dialogues or [row.prompt for row in held_out_prompts(session)[:n]]
    encoder, policy = session.encoder(source, settings.max_new_tokens), Policy(load_causal_lm(source))
    for i, dialogue in enumerate(dialogues):
        out = sample(
            policy,
            encoder.prompts([dialogue], [derive_seed(seed, "sample", i)]),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_id=encoder.ends,
            say=session.console.line,
        )
        text = encoder.decode(out.ids[0][out.response[0]].tolist())
        closed = bool(ended(out, encoder.ends)[0])
        yield {"prompt": encoder.readable_prompt(dialogue), "response": text, "ended": closed}
