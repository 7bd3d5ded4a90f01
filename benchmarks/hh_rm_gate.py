"""How well the gate of hh-rm's experts knows the kind of a prompt, and what that is worth.

    python benchmarks/hh_rm_gate.py --data PATH              kinds of a fifth of the training prompts
    python benchmarks/hh_rm_gate.py --data PATH --run RUN    and training pairs that RUN's `rm` has not seen

PATH is a directory with HH's sources; RUN a run of hh-smollm2, whose `rm` learns from the first half of the
prompts. No validation pair is scored. Run it with as many threads as the runs whose frozen states are kept.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hh_rm import Pairs, read
from hh_rm_probe import lower_blocks, stacked, tokens_of, told_apart
from hh_rm_rules import harmless

from preftune.data import Preference
from preftune.data.batch import PairIds, pad_sequences
from preftune.data.dataset import prompt_hash
from preftune.models.gate import fit_state_gate, fit_token_gate
from preftune.runs.experts import PROMPTS

SOURCES = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
OF_EACH = 320  # pairs of each source

Prompted = tuple[Preference, PairIds]
Gate = Callable[[Sequence[Prompted]], np.ndarray]  # prompts -> share of harmless


def gates(items: Sequence[Prompted]) -> dict[str, Gate]:
    """Both gates, fitted to these prompts as `preftune.runs.experts` fits them."""
    kinds = [0 if harmless(pair) else 1 for pair, _ in items]
    encoder = lower_blocks().encoder
    tokens = fit_token_gate([list(ids.prompt) for _, ids in items], kinds, len(encoder.tokenizer))
    used = [i for kind in (0, 1) for i in [n for n, k in enumerate(kinds) if k == kind][:PROMPTS]]
    states = stacked([items[i][0] for i in used])[1]
    by_state = fit_state_gate(torch.from_numpy(states), [kinds[i] for i in used], blocks=24)

    def of_tokens(asked: Sequence[Prompted]) -> np.ndarray:
        prompts = [list(ids.prompt) for _, ids in asked]
        batch = pad_sequences(prompts, [[0]] * len(prompts), encoder.pad_id)
        prompt = batch.attention & ~batch.response
        return tokens(lower_blocks().model, batch.ids, batch.attention, prompt)[0].numpy()

    def of_states(asked: Sequence[Prompted]) -> np.ndarray:
        logits = by_state.weight @ torch.from_numpy(stacked([pair for pair, _ in asked])[1]).T
        return (logits + by_state.bias[:, None]).softmax(0)[0].numpy()

    return {"tokens": of_tokens, "states": of_states}


def distinct(pairs: Sequence[Preference]) -> list[Prompted]:
    """The first pair of each prompt, in a drawn order."""
    firsts: dict[tuple[int, ...], Prompted] = {}
    for pair, ids in told_apart(lower_blocks().encoder, pairs):
        firsts.setdefault(tuple(ids.prompt), (pair, ids))
    items = list(firsts.values())
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))]


def kinds_of_prompts(pairs: Pairs) -> None:
    items = distinct(pairs.train)
    held, rest = items[: len(items) // 5], items[len(items) // 5 :]
    of_harmless = np.array([harmless(pair) for pair, _ in held])
    print(f"{len(held):,} prompts held out, {of_harmless.sum()} harmless, {len(rest):,} to fit to")
    for name, gate in gates(rest).items():
        share = gate(held)
        losses = -np.log(share[of_harmless]).mean(), -np.log(1 - share[~of_harmless]).mean()
        taken = [(share[which] > 0.5).mean() for which in (of_harmless, ~of_harmless)]
        print(f"{name}: of harmless {taken[0]:.3f}, of others {taken[1]:.3f}; loss {np.mean(losses):.3f}")


def pairs_of_the_other_half(pairs: Pairs, run: Path) -> None:
    from preftune.measure.reward_models import examiner
    from preftune.runs.reopen import reopen
    from preftune.runs.roles import keep_rows

    def half(pair: Preference) -> int:
        return int(prompt_hash(pair.prompt)[-1], 16) % 2  # as `Session.training_rows` cuts them

    first, other = ([pair for pair in pairs.train if half(pair) == which] for which in (0, 1))
    chosen, drawn = list[Preference](), np.random.default_rng(0)
    for source in SOURCES:
        own = [pair for pair in other if pair.source == source]
        chosen += [own[i] for i in drawn.permutation(len(own))[:OF_EACH]]
    by = examiner(reopen(run, write=False), "rm")
    items = told_apart(by.encoder, chosen)
    keep_rows(by.session, [by.model], tokens_of(items))
    scored = by.pair_scores("pairs", [pair for pair, _ in items])
    margins = np.array([np.subtract(row["chosen_members"], row["rejected_members"]) for row in scored])
    known = np.array([float(harmless(pair)) for pair, _ in items])
    shares = {"helpful expert": 0 * known, "kind known": known}
    shares |= {name: gate(items) for name, gate in gates(distinct(first)).items()}
    for name, share in shares.items():
        for how, weight in (("weighted", share), ("likeliest", share > 0.5)):
            mixed = weight * margins[:, 0] + (1 - weight) * margins[:, 1]
            right = (mixed > 0) + 0.5 * (mixed == 0)
            error = right.std() / len(right) ** 0.5
            print(f"{name}, {how}: {right.mean():.3f} of {len(right):,} (standard error {error:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path)
    asked = parser.parse_args()
    pairs = read(asked.data)
    kinds_of_prompts(pairs)
    if asked.run is not None:
        pairs_of_the_other_half(pairs, asked.run)


if __name__ == "__main__":
    main()
