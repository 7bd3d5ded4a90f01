"""STUDY.md: the tables of a study in words that a reader can check."""

from collections.abc import Mapping
from typing import Any

from preftune.evaluation.laws import LEAST_POINTS
from preftune.report.text import join
from preftune.study import frontier
from preftune.study.beside import DISTINCT_OF, LEAST_DISTINCT, MOST_KL, MOST_PERPLEXITY, section
from preftune.study.cells import interval, table
from preftune.study.design import SECOND_MODEL
from preftune.study.former import todays_words
from preftune.study.sweep import sweeps_of

Study = Mapping[str, Any]
GAINS = ("gold_gain", "score_gain")
SIZES = ("steps", "rows", "epochs", "batch_size")  # settings of how many tokens a stage trains on
_SET_WORDS = {
    "training": "Training forms (fresh prompts of the kind that the pairs have)",
    "combinations": "Unseen combinations (facts that occur nowhere else)",
    "wording": "Unseen wordings (a question form that only pretraining showed)",
    "test": "Test prompts",
}


def study_text(study: Study) -> str:
    """The whole page."""
    study = todays_words(study)
    sections = [_head(study), _conclusions(study)]
    for kind in study["prompt_sets"]:
        sections.append(f"## {_SET_WORDS.get(kind, kind)}\n\n{_policies(study, kind)}")
    sections += [
        _other_judges(study),
        _collapsed(study),
        _tokens(study),
        _equal_kl(study),
        _best_of_n(study),
        _seeds(study),
    ]
    sections += [_reward_model(study), *map(_sweep, sweeps_of(study)), _frontier(study), _figures(study)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(study: Study) -> str:
    seeds = [seed["seed"] for seed in study["seeds"]]
    return "\n".join(
        [
            f"# Study: {study['name']}",
            "",
            f"Made by `{study['command']}`.",
            "",
            f"Data {study['data']}; gold is **{study['gold']}**; seeds: {_comma_list(seeds)}; "
            f"{study['n_prompts']} prompts each, {study['replies']} replies to a prompt. Intervals: "
            f"{study['interval']}.",
            f"Gains are against {study['reference'].upper()} on the same prompts. A verdict is the "
            "interval's and nothing else's; `seeds for 80 %` is the number of seeds that would show a gain "
            "of the size seen, a rough number. Score is that of the run's own reward model.",
            *_second_model_words(study),
        ]
    )


def _second_model_words(study: Study) -> list[str]:
    if study["gold"] != SECOND_MODEL:
        return []
    trained = {
        True: "trained on pairs of other prompts than the first",
        False: "which shares prompts with the first",
        None: "of which it is not known whether it shares prompts with the first",
    }[study.get("gold_apart")]
    return [
        "",
        "Nobody knows the gold score of real text. What is called gold here is the score of a second reward "
        f"model, {trained}. It shares the first one's kind of mistakes: a gain here is weaker evidence than "
        "on the built-in world.",
    ]


def _conclusions(study: Study) -> str:
    conclusion = study.get("conclusions")
    words = "Written by hand, from the numbers of the tables below."
    return f"## Conclusions\n\n{words}\n\n{conclusion}" if conclusion else ""


def _policies(study: Study, kind: str) -> str:
    rows = []
    for policy in study["policies"].values():
        n = policy["sets"][kind]
        rows.append(
            [
                policy["label"],
                f"{n['gold']:.2f}",
                interval(n, "gold_gain", sign=True),
                n["gold_verdict"],
                n["seeds_needed"],
                interval(n, "score_gain", sign=True),
                interval(n, "win_rate"),
                interval(n, "kl"),
                f"{n['length']:.1f}",
                f"{n['eos_rate']:.3f}",
                f"{n['repetition_4']:.3f}",
            ]
        )
    heads = ["policy", "gold", "gold gain", "verdict", "seeds for 80 %", "score gain", "win rate (score)"]
    return table([*heads, "KL, nats", "length", "EOS", "repeated 4-grams"], rows)


def _other_judges(study: Study) -> str:
    heads, rows = section(study)
    if not rows:
        return ""
    texts = [policy["text"] for policy in study["policies"].values() if policy.get("text")]
    at_one_amount = texts and all(text.get("distinct_2_replies") for text in texts)
    replies = f"at most {DISTINCT_OF} replies" if at_one_amount else "all replies"
    words = (
        f"On the {study['main_set']} prompts. {_others_words(study)} A gain counts within limits "
        f"only: at most {MOST_KL:g} nats, distinct-2 of {replies} at least {LEAST_DISTINCT:g} of "
        f"SFT's, and perplexity under the base at most {MOST_PERPLEXITY:g} times SFT's (of the first reply "
        "to each prompt; means over seeds). Best-of-n is a choice among SFT's own replies, whose text is not "
        "measured apart: a dash, and whether it keeps the limits is not known."
    )
    return f"## Beside gold\n\n{words}\n\n{table(heads, rows)}"


def _others_words(study: Study) -> str:
    """A sentence for every judge beside gold that training saw, in one way or the other."""
    trained, labelled = (dict(study.get(key, {})) for key in ("others_seen", "others_labelled"))
    sentences = []
    for judge in dict.fromkeys(
        judge for judges in [*labelled.values(), *trained.values()] for judge in judges
    ):
        makers, learners = (
            [name for name, judges in by_stage.items() if judge in judges] for by_stage in (labelled, trained)
        )
        clauses = [f"the pairs of {_stages(makers)} were labelled by {judge}"] if makers else []
        clauses += [f"{_stages(learners)} {_were(learners)} trained on {judge}"] if learners else []
        on = "what learnt from these" if makers else "it" if len(learners) == 1 else "them"
        text = f"{', and '.join(clauses)}: {judge} is no check on {on}."
        sentences.append(text[0].upper() + text[1:])
    return " ".join(sentences) or "No training saw the other judges."


def _stages(names: list[str]) -> str:
    return f"stage{'s' if len(names) > 1 else ''} {join(names)}"


def _were(names: list[str]) -> str:
    return "were" if len(names) > 1 else "was"


def _collapsed(study: Study) -> str:
    lines = [
        f"* {study['policies'][name]['label']}, seed {seed['seed']}: {', '.join(policy['collapsed_why'])}"
        for seed in study["seeds"]
        for name, policy in seed["policies"].items()
        if policy["collapsed"]
    ]
    rule = (
        "A policy counts as collapsed at a seed if its gold interval (over that seed's prompts) lies below "
        "SFT, if it ends fewer than half as many of its replies as SFT (where SFT ends a tenth or more), or "
        "if it repeats 0.1 more of its 4-grams. Collapsed seeds stay in every mean."
    )
    return "\n".join(["## Collapsed seeds", "", rule, "", *(lines or ["None."])])


def _tokens(study: Study) -> str:
    rows = [
        [p["label"], _count(p["tokens_trained"]), _count(p["tokens_sampled"]), _count(p["steps"])]
        for p in study["policies"].values()
        if p["tokens_trained"] is not None
    ]
    budget = study["token_budget"]
    plan = f"The plan was {budget:,} tokens each. " if budget else "The recipe's own sizes were kept. "
    sizes = [s["key"] for s in sweeps_of(study) if s["key"].rpartition(".")[2] in SIZES]
    if budget and sizes:
        plan += f"Not for the values of {_comma_list(sizes)}, which is how much is trained. "
    words = (
        f"{plan}Trained: tokens of prompts and responses through the policy's training forward, epochs "
        "included, counted while training; sampled: response tokens, which cost a forward each besides. "
        "Means over seeds."
    )
    heads = ["policy", "tokens trained", "tokens sampled", "steps"]
    return f"## Tokens\n\n{words}\n\n{table(heads, rows)}"


def _equal_kl(study: Study) -> str:
    rows = []
    for policy in study["policies"].values():
        at = policy["bon_kl_gain"]
        if at is not None:
            gain = {"gain": at["value"], "gain_low": at["low"], "gain_high": at["high"]}
            against = interval(gain, "gain", sign=True)
            rows.append([policy["label"], interval(policy, "kl"), against, at["verdict"]])
    if not rows:
        return ""
    largest = study["best_of_n"][-1]
    words = (
        "Gold minus the gold of best-of-n at the policy's own KL, seed by seed and paired by prompt; two "
        "policies are compared at equal KL through this common yardstick. Best-of-n lies between its sizes "
        "linearly in √KL; its KL is the formula ln n - (n - 1)/n, an upper bound. Policies beyond "
        f"{largest['kl']:.2f} nats (n = {largest['n']}) at any seed cannot be compared so and are left out."
    )
    heads = ["policy", "KL, nats", "gold against best-of-n at that KL", "verdict"]
    return f"## At equal KL\n\n{words}\n\n{table(heads, rows)}"


def _best_of_n(study: Study) -> str:
    rows = [
        [point["n"], f"{point['kl']:.2f}", *(interval(point, gain, sign=True) for gain in GAINS)]
        for point in study["best_of_n"]
        if point["n"] in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) or point is study["best_of_n"][-1]
    ]
    heads = ["n", "KL (formula)", "gold gain", "score gain"]
    return f"## Best-of-n of SFT\n\n{table(heads, rows)}"


def _seeds(study: Study) -> str:
    names = [name for name in study["policies"] if name != study["reference"]]
    rows = []
    for seed in study["seeds"]:
        cells = []
        for name in names:
            policy = seed["policies"][name]
            mark = " (collapsed)" if policy["collapsed"] else ""
            cells.append(f"{interval(policy, 'gold_gain', sign=True)}{mark}")
        rows.append([seed["seed"], *cells])
    labels = [study["policies"][name]["label"] for name in names]
    words = f"Gold gain over SFT on the {study['main_set']} prompts; intervals over the seed's prompts."
    return f"## Seed by seed\n\n{words}\n\n{table(['seed', *labels], rows)}"


def _reward_model(study: Study) -> str:
    by_kind = study["reward_model"]  # of prompts
    if by_kind is None:
        return ""
    rows = [
        [
            kind,
            f"{numbers['accuracy']:.3f}",
            _comma_list(f"{s['value']:.3f}" for s in numbers["by_seed"]),
            f"{numbers['best_reachable']:.3f}",
            numbers["n_pairs"],
        ]
        for kind, numbers in by_kind.items()
    ]
    kinds, first = list(by_kind), next(iter(by_kind.values()))
    gaps = [
        [
            component,
            *(
                f"{on_kind['gaps'][component]['gap_sd']:+.2f}" if component in on_kind["gaps"] else "–"
                for on_kind in by_kind.values()
            ),
            f"{gap['accuracy']:.2f}",
            gap["n"],
        ]
        for component, gap in first["gaps"].items()
    ]
    heads = ["prompts", "accuracy", "by seed", "best reachable", "pairs a seed"]
    words = (
        "Gap: mean score of the better minus the worse of two replies that differ in one part of gold alone, "
        "in sd of the scores. 0 means that the reward model does not see that part; below 0 it prefers the "
        'worse. "stacked courtesies" is the blind spot that the world leaves on purpose.'
    )
    columns = ["part of gold", *(f"gap, {kind}" for kind in kinds), f"accuracy, {kinds[0]}", "pairs"]
    return f"## Reward model on fresh pairs\n\n{table(heads, rows)}\n\n{words}\n\n{table(columns, gaps)}"


def _frontier(study: Study) -> str:
    heads, rows = frontier.section(study)
    if not rows:
        return ""
    words = (
        "Gold at equal KL, linear in √KL between the values that a method was trained at, seed by seed, "
        "paired by prompt; a dash below the smallest and beyond the largest KL that these reached at some "
        "seed. The KL of best-of-n is its formula."
    )
    return f"## Frontier\n\n{words}\n\n{table(heads, rows)}"


def _sweep(sweep: Study) -> str:
    rows = [
        [
            point["value"],
            interval(point, "kl"),
            *(interval(point, gain, sign=True) for gain in GAINS),
            f"{point['eos_rate']:.3f}",
            f"{point['length']:.1f}",
        ]
        for point in sweep["means"]
    ]
    names = {
        "rl_gold": "RL, gold",
        "rl_score": "RL, score",
        "bon_gold": "best-of-n, gold",
        "bon_score": "best-of-n, score",
    }
    laws = [
        [
            names[name],
            law["law"],
            _plus_minus(law, "alpha"),
            _plus_minus(law, "beta"),
            law["n"],
            f"{float(law['r2']):.2f}",
            _peak(law, max(point["sqrt_kl"] for point in [*sweep["points"], *sweep["best_of_n"]])),
        ]
        for name, law in sweep["laws"].items()
        if law is not None
    ]
    words = (
        "Laws of Gao et al. (arXiv:2210.10760) with d = √KL, least squares without a constant; ± is one "
        "standard error: for RL robust to what the points of one seed share (two seeds or more), for "
        "best-of-n that of independent points, which neighbouring n are not. `peak` is the √KL from which on "
        "more optimisation loses gold, by the law; outside the range of the points it is extrapolation, and "
        "beyond ten times the farthest of them no number."
    )
    if len(sweep["points"]) < LEAST_POINTS:
        words += f" None for RL: {len(sweep['points'])} points, and two coefficients want {LEAST_POINTS}."
    heads = [str(sweep["key"]), "KL, nats", "gold gain", "score gain", "EOS", "length"]
    fits = table(["curve", "law", "alpha", "beta", "points", "R²", "peak √KL"], laws)
    return f"## Sweep of {sweep['key']}\n\n{table(heads, rows)}\n\n{words}\n\n{fits}"


def _peak(law: Mapping[str, Any], farthest: float) -> str:
    peak = law["peak_sqrt_kl"]
    return "-" if peak is None or peak > 10 * farthest else f"{peak:.2f}"


def _figures(study: Study) -> str:
    names = ["gains", "kl", *(["sweep"] if study["sweep"] else [])]
    names += ["frontier"] if study.get("frontier") else []
    return "\n".join(["## Figures", "", *(f"![{name}](figures/{name}.svg)" for name in names)])


def _plus_minus(law: Mapping[str, Any], name: str) -> str:
    return f"{law[name]:.3f} ± {float(law[f'{name}_se']):.3f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _comma_list(values: Any) -> str:
    return ", ".join(str(value) for value in values)
