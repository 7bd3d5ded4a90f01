"""The report on collected replies: who judged what, how often, how well it agrees; and their data card."""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, cast

import yaml

from preftune.config import stages_until
from preftune.config.algorithms.collect import CollectConfig
from preftune.data.pairing import Pair, best_reachable
from preftune.evaluation.stats import bootstrap_mean, win_rate
from preftune.rundir import read_jsonl
from preftune.runs.cards import code
from preftune.runs.llm_judge import share
from preftune.runs.session import Session
from preftune.version import __version__

Json = dict[str, Any]


def collecting(session: Session, name: str) -> CollectConfig:
    """The settings of a stage that makes data: that there is but one kind is relied on only here."""
    return cast(CollectConfig, session.config.stage[name])


def labels(labelled: Sequence[tuple[Json, Pair]], noise: float | None) -> Json:
    """How the labels agree with the judge's scores, how well anybody could do where they are drawn, and how
    often the longer reply is chosen.
    """
    scores = [(row["scores"][pair.chosen], row["scores"][pair.rejected]) for row, pair in labelled]
    words = [[len(row["replies"][i].split()) for i in (pair.chosen, pair.rejected)] for row, pair in labelled]
    uneven = [a > b for a, b in words if a != b]
    return {
        "label_temperature": noise,
        "labels_agree": fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in scores),
        "best_reachable": best_reachable([pair for _, pair in labelled]),
        "longer_wins": share(sum(uneven), len(uneven)),
    }


def earlier(session: Session, name: str, rows: Sequence[Json]) -> Json:
    """By stage, the win rate of these replies over those that an earlier stage collected to the same prompts
    and that the same judge scored by the same rule. Not for a language model: its scores compare the
    replies of one prompt, and do not say which of two collections is better.
    """
    stages, rates = session.config.stage, Json()
    config = collecting(session, name)
    scoring = config.judge, config.missing_eos_score
    for previous in stages_until(stages, name)[:-1]:
        if stages[previous].makes != "data" or stages[previous].asks is not None:
            continue
        settings = collecting(session, previous)
        if (settings.judge, settings.missing_eos_score) == scoring:
            scores = read_jsonl(session.run.collected(previous) / "replies.jsonl")
            rates[previous] = _win_rate(rows, scores, session.config.evaluation.resamples)
    return rates


def _win_rate(new_rows: Sequence[Json], old_rows: Sequence[Json], resamples: int) -> Json:
    """Over common prompts the share of pairs (a new and an old reply) that the new one wins; the interval is
    a bootstrap over prompts.
    """
    by_prompt = {json.dumps(row["prompt"]): row["scores"] for row in old_rows}
    pairs = [(row["scores"], by_prompt.get(json.dumps(row["prompt"]))) for row in new_rows]
    rates = [win_rate([a for a in new for _ in old], old * len(new)) for new, old in pairs if old]
    if not rates:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = bootstrap_mean(rates, resamples)
    return {"value": fmean(rates), "low": low, "high": high, "n": len(rates)}


def in_words(facts: Json) -> str:
    """One line for the console."""
    text = f"{facts['replies']:,} replies to {facts['prompts']:,} prompts, {facts['pairs']:,} pairs"
    if facts["left_out_pairs"]:
        text += f" ({facts['left_out_pairs']:,} ties left out)"
    if facts["label_temperature"] is not None:
        text += f"; labels agree with the judge in {facts['labels_agree']:.1%}"
        text += f", at best {facts['best_reachable']:.1%} can be predicted"
    for stage, rate in facts.get("beats", {}).items():
        text += f"; win rate over {stage} {_percent(rate)}"
    if (usage := facts.get("llm")) is not None:
        text += f"; {usage['questions']:,} questions, {usage['no_verdict']:,} without a verdict"
        text += f"; {usage['tokens_in']:,} tokens in, {usage['tokens_out']:,} out"
        text += "" if usage["cost"] is None else f", cost {usage['cost']:.4g}"
    return text


def data_card(session: Session, name: str, facts: Json) -> str:
    """README.md beside the files: what they hold, who judged it, how often, and how far to trust it."""
    files = [{"config_name": "default", "data_files": "preferences.jsonl"}]
    head = yaml.safe_dump({"tags": ["preftune", "preference", "dpo"], "configs": files}, sort_keys=False)
    config = collecting(session, name)
    lines = [
        f"- {facts['replies']:,} replies of {code(config.init)} (SHA-256 of its weights "
        f"{code(facts['policy_sha256'][:12])}) to {facts['prompts']:,} prompts",
        f"- judged by {code(facts['judge'])}; {facts['pairs']:,} pairs, {facts['left_out_pairs']:,} left out "
        "(equal scores, or twice the same text)",
        *_trust(facts),
    ]
    if (score := config.missing_eos_score) is not None:
        lines.append(f"- a reply that does not end has the score {score:g}, whatever the judge gives it")
    if config.truncated == "drop":
        lines.append("- replies that do not end are in no pair")
    use = 'load_dataset("json", data_files="preferences.jsonl")  # prompt, chosen, rejected: TRL reads it'
    sections = [
        f"---\n{head}---",
        f"# {name}",
        f"Replies of a policy, judged: preference data. Made with preftune {__version__}, run "
        f"{code(session.config.name)}, seed {session.config.seed}.",
        "## Who judged what\n\n" + "\n".join(lines),
        f"## How to load\n\n```python\nfrom datasets import load_dataset\n\n{use}\n```",
        "## Limits\n\n- The prompts are those of the run's training data, with its licence and its texts.\n"
        "- The replies are a model's: they can be wrong or harmful. The labels are a judge's, not people's.",
    ]
    return "\n\n".join(sections) + "\n"


def _trust(facts: Json) -> list[str]:
    """Label noise, length, the language model that was asked, other collections."""
    noise, reachable = facts["label_temperature"], facts["best_reachable"]
    drawn = "the higher score is chosen" if noise is None else f"labels are drawn at temperature {noise:g}"
    lines = [
        f"- {drawn}: they agree with the scores in {facts['labels_agree']:.1%}; the best accuracy that "
        f"anybody can be expected to reach on them is {reachable:.1%}",
        f"- the longer reply is chosen, where lengths differ: {_percent(facts['longer_wins'])}",
    ]
    for stage, rate in facts.get("beats", {}).items():
        lines.append(f"- win rate over the replies of {code(stage)} to the same prompts: {_percent(rate)}")
    if (usage := facts.get("llm")) is not None:
        named = ", ".join(code(model) for model in usage["answered_by"]) or "a model that gave no name"
        lines += [
            f"- asked {usage['questions']:,} questions, answered by {named}: ties {usage['ties']:,}, "
            f"without a verdict {usage['no_verdict']:,}, of which refused {usage['refused']:,}",
            f"- the same outcome in both orders: {_percent(usage['both_orders'])}; the reply that stands "
            f"first wins {_percent(usage['first_wins'])} (without a preference for a place: about half)",
        ]
    return lines


def _percent(share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return "not known (n = 0)"
    return f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}] (n = {share['n']:,})"
