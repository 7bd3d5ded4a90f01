"""The gate of a reward stage whose members are experts: which expert's score counts for which prompt."""

from collections.abc import Sequence

import torch

from preftune.data import Encoder, Preference, first_encoded
from preftune.data.select import distinct_prompts
from preftune.models.gate import PromptGate, fit_state_gate, fit_token_gate
from preftune.models.layers import blocks_of
from preftune.models.locate import Source
from preftune.models.roles import RewardModel
from preftune.models.scalar import load_scalar_model
from preftune.models.trunk import forget_states
from preftune.runs.roles import keep_rows, share
from preftune.runs.save import chosen_batches
from preftune.runs.session import Session
from preftune.runs.stages import Stage
from preftune.training.learner import Learner

PROMPTS = 1024  # of each kind, for a gate that reads states
BATCH = 16  # prompts at a time


def fitted_gate(session: Session, stage: Stage, expert: Source, learner: Learner) -> PromptGate:
    """A gate fitted to the stage's training prompts, each of the kind of the first expert that learns from
    its source. If the experts share blocks, the gate reads the states after those, of at most PROMPTS prompts
    of each kind, drawn from the seed and computed by the learner; else the tokens of all prompts.
    """
    encoder, top = session.encoder(expert), session.config.shared_blocks()
    settings = session.config.stage[stage.name]
    words, rows = settings.kinds, session.training_rows(settings.training_part(), stage.name)
    firsts, ids = distinct_prompts(encoder, first_encoded(encoder, rows, None)[0])
    kinds = [next(i for i, word in enumerate(words) if word in row.source) for row in firsts]
    most = None if top is None else PROMPTS
    groups = [[n for n, of_row in enumerate(kinds) if of_row == kind][:most] for kind in range(len(words))]
    counts = ", ".join(f"{len(group):,} {word}" for group, word in zip(groups, words, strict=True))
    session.console.line(f"{stage.name}: the kind of a prompt is learnt from {counts} ones")
    if top is None:
        return fit_token_gate(ids, kinds, len(encoder.tokenizer))
    model = RewardModel(load_scalar_model(expert))
    blocks = len(blocks_of(model.model)) - top
    share(model, top)
    learner.freeze(model)

    def fitted(groups: Sequence[Sequence[int]]) -> PromptGate:
        used = sorted(n for group in groups for n in group)
        states = _states(session, model, encoder, [firsts[n] for n in used], blocks, learner)
        return fit_state_gate(states, [kinds[n] for n in used], blocks)

    return session.go_over(stage.name, groups, fitted, trained_on=True)


def _states(
    session: Session,
    model: RewardModel,
    encoder: Encoder,
    rows: Sequence[Preference],
    blocks: int,
    learner: Learner,
) -> torch.Tensor:
    """States (n, d) of the rows' prompts after so many blocks, in the run's precision. Each prompt goes
    through with its chosen reply, as in training, whose states may lie on disk.
    """
    batches = chosen_batches(encoder, rows, BATCH)
    keep_rows(session, [model], int(sum(batch.attention.sum() for batch in batches)))
    states = list[torch.Tensor]()
    for batch in batches:
        states.append(model.prompt_states(batch.to(learner.device), blocks).cpu())
        forget_states()
    return torch.cat(states)
