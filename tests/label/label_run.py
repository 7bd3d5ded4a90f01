"""A small run with replies to judge, made by hand: nothing is trained."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.label.judgements import Judgement
from preftune.label.store import Store, begin, find_set
from preftune.rundir import RunDir, write_jsonl, write_text
from preftune.sums import write_sealed


def collected(folder: Path, n: int = 30, replies: int = 2, scores: bool = True) -> RunDir:
    """`n` prompts as a stage `pairs` collects them; scores rise with the reply's number, by ever more."""
    rows: list[dict[str, Any]] = [
        {
            "row": i,
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "replies": [f"Reply {i}.{j}" + "!" * j for j in range(replies)],
            "scores": [0.1 * (n - i) * j for j in range(replies)] if scores else [],
            "ended": [j != 1 for j in range(replies)],
        }
        for i in range(n)
    ]
    write_jsonl(folder / "collected" / "pairs" / "replies.jsonl", rows)
    return RunDir(folder)


def sampled(folder: Path, n: int = 20) -> RunDir:
    """`n` prompts with a sample of SFT and one of DPO each."""
    for policy in ("sft", "dpo"):
        write_jsonl(
            RunDir(folder).samples_file(f"policy_{policy}"),
            [
                {
                    "row": i,
                    "prompt": f"\n\nHuman: Question {i}?\n\nAssistant:",
                    "response": f" By {policy} {i}",
                }
                for i in range(n)
            ],
        )
    write_text(
        RunDir(folder).config,
        "".join(f'[stage.{name}]\nalgorithm = "{name}"\n' for name in ("sft", "dpo", "ppo")),
    )
    return RunDir(folder)


def trained_again(run: RunDir, *stages: str, shared: Sequence[str] = ()) -> RunDir:
    """As if these stages were not those that were measured any more; `shared`: which all numbers hang on."""
    record = {"made_from": dict.fromkeys(stages, "an old sum"), "shared": list(shared)}
    write_sealed(run.stage_json("evaluation"), record)
    return run


def begun(run: RunDir, source: str | None = None, name: str | None = None, **wanted: Any) -> Store:
    return begin(*find_set(run, name, source), wanted)


def say(state: Mapping[str, Any], verdict: str, **more: Any) -> Judgement:
    """A judgement of the slot that is shown."""
    return Judgement.model_validate(
        {"id": secrets.token_hex(8), "slot": state["slot"]["key"], "verdict": verdict, **more}
    )


def judge_all(store: Store, rater: str, verdict: Any) -> int:
    """Judge whatever is shown; `verdict` is a word, or a function of the slot. The number of judgements."""
    count = 0
    while (state := store.state(rater))["slot"]:
        word = verdict if isinstance(verdict, str) else verdict(state["slot"])
        store.record(rater, say(state, word))
        count += 1
    return count
