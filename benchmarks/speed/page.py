"""docs/performance.md from benchmarks/results/*.json. Usage: page.py > docs/performance.md"""

import json
from pathlib import Path
from typing import Any

from work import EOS, GROUP, NEW_TOKENS, PROMPT, PROMPTS, RESPONSE, SIZES, STAGES, VOCABULARY

RESULTS = Path(__file__).resolve().parents[1] / "results"
TARGETS = {
    "sft": 2.0,
    "reward": 2.5,
    "dpo": 3.5,
    "dpo_cached": 2.5,
    "generate_groups": 3.0,
    "generate_distinct": 1.5,
    "grpo": 2.5,
    "ppo": 2.5,
}
SGEMM = 0.75  # of its limit, for updates at 124m
WORK = {
    "sft": "one update on chosen responses",
    "reward": "one update on pairs",
    "dpo": "one update on pairs, the reference asked in each step",
    "dpo_cached": "the same with the reference's log-probs remembered",
    "generate_groups": f"{GROUP} responses to one prompt; against `model.generate`",
    "generate_distinct": f"one response to each of {GROUP} prompts; against `model.generate`",
    "grpo": f"a whole step: {PROMPTS} prompts × {GROUP} responses, KL on, one update",
    "ppo": f"a whole step: one response to each of {PROMPTS} prompts, four updates of policy and critic; "
    "against TRL 1.12.0",
    "evaluate": "responses, exact KL, k1 and scores; against `model.generate` and full forwards",
}
MODELS = {  # trained, only asked
    "sft": (1, 0),
    "reward": (1, 0),
    "dpo": (1, 1),
    "dpo_cached": (1, 1),
    "generate_groups": (0, 1),
    "generate_distinct": (0, 1),
    "grpo": (1, 2),
    "ppo": (2, 2),
    "evaluate": (0, 3),
}
POSITIONS = 1024  # GPT2Config's own
HEAD = f"""# Performance

Generated from `benchmarks/results/*.json` by `benchmarks/speed/page.py`; `make bench` measures again.

Both sides are processes that take turns on one machine, a step each, A B A B, after one step that does
not count. The ratio is TRL's time over preftune's for a pair of neighbouring steps: the median, and the
lowest and the highest pair. CPU ratios are the same of processor time, which other processes on the
machine disturb less.

Work: rows of HH-RLHF drawn at random from the whole corpus, GPT-2's tokenizer (vocabulary {VOCABULARY},
end token {EOS}), prompts of up to {PROMPT} and responses of up to {RESPONSE} tokens, {NEW_TOKENS} new
tokens where something is sampled; GPT-2 shapes with random weights and without dropout; float32 on a
CPU, no gradient checkpointing on either side. A step holds what a real one does: collation (and on our
side encoding), metrics, optimizer. That both did the same work is checked in each run: losses of every
step agree to 1e-4 (SFT, reward model, DPO), token counts agree (the others), and the log-probs at which
our sampler drew agree with plain Hugging Face forwards (to 1e-5 on the tokens drawn, to 5e-5 over the
vocabulary); GRPO's loss on fixed completions to prompts of equal length agrees to 1e-4.

How much TRL pads depends on how ragged a batch is: with 4 prompts a step at 124m instead of {PROMPTS}, PPO's
ratio was 1.98 (one pair, an earlier commit).

Decoding goes through a kernel of our own where one is built: `make native`, or beside an installed package
`python -m preftune.models.fast.native`. It needs a C++ compiler and AVX2, and takes seconds;
nothing is compiled at any other time, and without it torch does the same work. It multiplies few rows (at
most 64) by large matrices where they lie, and attends to shared prompts, and adds in the same order in both,
whatever the other rows are. `make bench` builds it; what the stages of generation reach without it stands
below the table.
"""


def row(s: dict[str, Any]) -> str:
    target = TARGETS.get(s["stage"])
    ratio = f"**{s['ratio_median']:.2f}** ({s['ratio_low']:.2f}–{s['ratio_high']:.2f})"
    cpu = f"{s['cpu_ratio_median']:.2f} ({s['cpu_ratio_low']:.2f}–{s['cpu_ratio_high']:.2f})"
    amount = s.get("new_tokens") or s.get("useful_tokens") or 0
    limit = s.get("share_of_sgemm", s.get("share_of_limit"))
    share = "" if limit is None else f"{100 * limit:.0f}%"
    met = "" if target is None else ("met" if s["ratio_median"] >= target else "missed")
    cells = [
        f"`{s['stage']}`",
        str(s["pairs"]),
        ratio,
        cpu,
        f"{s['seconds_ours']:.2f} / {s['seconds_theirs']:.2f}",
        f"{amount / s['seconds_ours']:.0f} / {amount / s['seconds_theirs']:.0f}",
        f"{s['peak_mb_ours']:.0f} / {s['peak_mb_theirs']:.0f}"
        + ("" if s["peak_mb_ours"] <= s["peak_mb_theirs"] else " (more)"),
        share,
        "" if target is None else f"{target:g} {met}",
    ]
    return "| " + " | ".join(cells) + " |"


def notes(size: str, stages: list[dict[str, Any]]) -> list[str]:
    """What the limit is, how close both sides came, and the fallback."""
    lines = [
        "The limit: for updates, sgemm on tokens that are not computed twice; for generation, prompts by "
        "sgemm, then each token at sgemm or at one reading of all weights, whichever takes longer. Each "
        "round is compared with what was measured just before it: the median."
    ]
    if size == "124m":
        below = [s for s in stages if s.get("share_of_sgemm", 1) < SGEMM]
        found = ", ".join(f"`{s['stage']}` {s['share_of_sgemm']:.0%}" for s in below) or "no stage"
        lines.append(f"Target for updates at this size: {SGEMM:.0%} of sgemm; missed by {found}.")
    without = [s for s in stages if "ratio_without_kernel" in s]
    if without:
        found = ", ".join(f"`{s['stage']}` {s['ratio_without_kernel']:.2f}" for s in without)
        lines.append(f"Without the kernel, same runs: {found}.")
    drift = [s for s in stages if "drift_drawn" in s]
    if drift:
        drawn, all_of_them = (max(s[f"drift_{k}"] for s in drift) for k in ("drawn", "vocabulary"))
        lines.append(f"Log-probs differ by at most {drawn:.1e} on tokens drawn, {all_of_them:.1e} anywhere.")
    losses = [s for s in stages if "largest_loss_difference" in s]
    if losses:
        found = ", ".join(f"`{s['stage']}` {s['largest_loss_difference']:.1e}" for s in losses)
        lines.append(f"Losses differ by at most: {found}.")
    for note in dict.fromkeys(s["note"] for s in stages if "note" in s):
        where_said = ", ".join(f"`{s['stage']}`" for s in stages if s.get("note") == note)
        lines.append(f"{where_said}: {note}")
    return ["\n".join(f"* {line}" for line in lines)]


def table(result: dict[str, Any]) -> str:
    shape, machines = result["shape"], [s["machine"] for s in result["stages"]]
    sgemm, read_rate = ([m[k] for m in machines] for k in ("sgemm_gflops", "read_gb_per_s"))
    lines = [
        f"## {result['size']}: {shape['n_layer']} layers, width {shape['n_embd']}",
        "",
        f"{result['when']}, {result['threads']} thread(s) a side; an update of `sft`, `reward` and `dpo` has "
        f"{shape['batch']} rows or pairs. Measured before each round, the medians of "
        f"the stages: sgemm {min(sgemm):.0f} to {max(sgemm):.0f} GFLOP/s, reading {min(read_rate):.0f} to "
        f"{max(read_rate):.0f} GB/s.",
        "",
        "| stage | pairs | ratio | CPU ratio | s, ours / TRL | tokens/s | peak MB | of the limit | target |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(row, result["stages"]),
    ]
    lines += ["", *notes(result["size"], result["stages"])]
    missing = [s for s in STAGES if s not in {r["stage"] for r in result["stages"]}]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return "\n".join(lines)


def memory(results: list[dict[str, Any]]) -> str:
    """Measured peaks beside what arithmetic demands."""
    lines = [
        "## Memory against the plan",
        "",
        "The plan: 16 bytes for each parameter that is trained (weight, gradient, two moments), 4 for each",
        "that is only asked. Above it lie the process (some 380 MB when all is imported),",
        "activations, tiles of logits (up to 128 MB wait for the backward pass) and, in generation, keys and",
        "values.",
        "",
        "| size | stage | models trained / asked | plan, MB | peak, MB | above the plan, MB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        shape = result["shape"]
        width = shape["n_embd"]
        parameters = 12 * shape["n_layer"] * width**2 + (VOCABULARY + POSITIONS) * width
        for s in result["stages"]:
            trained, asked = MODELS[s["stage"]]
            plan = (16 * trained + 4 * asked) * parameters / 2**20
            peak = s["peak_mb_ours"]
            cells = [result["size"], f"`{s['stage']}`", f"{trained} / {asked}"]
            cells += [f"{plan:.0f}", f"{peak:.0f}", f"{peak - plan:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def where(found: dict[str, Any]) -> str:
    lines = [
        "## Where the time goes",
        "",
        "CPU seconds a step, ours, with clocks around the parts; for updates, seconds by kind of operation",
        "(logits beyond 128 MB, which the backward pass computes again, are products). By",
        "`benchmarks/speed/where.py`.",
        "",
    ]
    for size, by_stage in found.items():
        for stage, parts in by_stage.items():
            whole = sum(parts.values())
            ordered = sorted(parts.items(), key=lambda item: -item[1])
            shares = ", ".join(f"{name} {seconds:.2f} ({seconds / whole:.0%})" for name, seconds in ordered)
            lines.append(f"* {size}, `{stage}`, {whole:.2f} s: {shares}")
    return "\n".join(lines)


def growth(found: dict[str, Any]) -> str:
    lines = [
        "## Growth",
        "",
        "Size small unless parameters vary; the least CPU seconds of three, fitted by seconds = a · x^p,",
        "over all points and over the larger half: `benchmarks/speed/growth.py`.",
        "",
        "| series | x: seconds | p | p, larger half |",
        "|---|---|---|---|",
    ]
    for s in found["series"]:
        points = ", ".join(f"{x:g}: {seconds:.2f}" for x, seconds in s["points"])
        lines.append(f"| {s['series']} | {points} | {s['power']:.2f} | {s['power_of_larger_half']:.2f} |")
    return "\n".join(lines)


def overhead(found: dict[str, Any]) -> str:
    prompts, took = found["evaluation_prompts"], found["evaluation_seconds"]
    starts = ", ".join(f"{s:.1f}" for s in found["first_step_seconds"])
    steps, every = found["steps"], found["checkpoint_every"]
    return f"""## Overhead

A DPO step at {found["size"]}: the update takes {found["step_seconds"]:.2f} s; encoding and metrics take
{1000 * found["bookkeeping_seconds"]:.1f} ms, a checkpoint, every {every} steps,
{found["checkpoint_seconds"]:.1f} s. {100 * found["share"]:.1f}% of a step is not the update (n = {steps}).
Measuring a policy on {prompts} prompts takes {took:.0f} s; {100 * found["evaluation_share"]:.1f}% of that is
neither sampling nor divergences nor scores but texts, intervals and comparisons.
`preftune run quickstart` takes {starts} s from its start to its first step, importing torch not counted.
All by `benchmarks/speed/overhead.py`."""


def main() -> None:
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (RESULTS / f"{size}.json" for size in SIZES if size != "smoke")
        if path.is_file()
    ]
    stages = "\n".join(f"* `{stage}`: {text}" for stage, text in WORK.items())
    parts = (("where", where), ("growth", growth), ("overhead", overhead))
    others = [make(found) for name, make in parts if (found := read(name)) is not None]
    print("\n\n".join([HEAD.rstrip(), stages, *map(table, results), memory(results), *others]))


if __name__ == "__main__":
    main()
