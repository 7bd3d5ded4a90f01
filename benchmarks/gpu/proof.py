"""What an hour on a GPU is used for.

    proof.py [a b c d e] [--device cuda|cpu] [--out DIR] [--data DIR] [--small]

Parts (each a list of commands, under 9 minutes together):
  a  selftest; log-probabilities and TRL's updates in float32, bf16 and fp16
  b  all stages of tiny and quickstart, first gradients against the CPU's, killed and resumed bit for bit
  c  sampling beside plain transformers and vLLM, updates beside TRL's, share of the card's limits, memory
  d  hh-smollm2 and sentiment in bf16, with budgets for a card, and their reports
  e  hh-colab with stand-ins for model and data, fp16, memory capped to 16 GB

A command that was done with the same arguments on the same card is not done again, so that a session that was
cut off goes on. Nothing needs a network or Git: packages that are missing come from DIR/wheels (`wheels.py`),
HH pairs and reviews from DATA/hh-rlhf and DATA/imdb. Writes DIR/proof.json and, from it, DIR/gpu.md. --small
and --device cpu are for the rehearsal, in which part d takes stand-ins, too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import wheels

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PART_SECONDS = 9 * 60
STAGES = ("sft", "rm", "ppo", "grpo", "dpo")
FOR_A_CARD = [
    *(f"stage.{stage}.{words}" for stage in ("sft", "dpo") for words in ("rows=4096", "batch_size=32")),
    *(f"stage.rm.{words}" for words in ("rows=8192", "batch_size=32")),
    *(f"stage.{stage}.{words}" for stage in ("ppo", "grpo") for words in ("steps=60", "batch_size=64")),
    *(f"stage.{stage}.microbatch_size=32" for stage in STAGES),
    *(
        "stage.grpo.group_size=8",
        "checkpoint.every=40",
        "evaluation.prompts=200",
        "evaluation.batch_size=100",
    ),
]
Command = tuple[str, list[str], dict[str, str]]  # name, arguments of Python, environment


def cli(*words: str) -> list[str]:
    return ["-m", "preftune", *words]


def measured(kind: str, file: Path, *words: str, small: bool = False) -> list[str]:
    return [str(HERE / "measure.py"), kind, str(file), *words, *(["--small"] if small else [])]


def part_a(out: Path, data: Path, small: bool) -> list[Command]:
    kinds = ("precision", "golden")
    commands = [(kind, measured(kind, out / f"{kind}.json", small=small), {}) for kind in kinds]
    return [("selftest", cli("selftest", "--json", str(out / "selftest.json")), {}), *commands]


def part_b(out: Path, data: Path, small: bool) -> list[Command]:
    commands: list[Command] = []
    for recipe in ["tiny"] if small else ["tiny", "quickstart"]:
        for where, more in (("device", {}), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
            place = str(out / f"{recipe}-{where}")
            commands.append((f"{recipe} on {where}", cli("run", recipe, "--out", place), more))
        files = [str(out / f"{recipe}-{where}") for where in ("device", "cpu")]
        compare = measured("gradients", out / f"{recipe}-gradients.json", *files)
        commands.append((f"{recipe} first gradients", compare, {}))
    if small:
        return [
            *commands,
            ("sft of tiny, killed and resumed", cli("verify-resume", "tiny", "sft", "--kills", "1"), {}),
        ]
    for recipe, stage in [("tiny", ""), *(("quickstart", stage) for stage in STAGES)]:
        resume = cli("verify-resume", recipe, *filter(None, [stage]), "--kills", "1" if stage else "3")
        commands.append((f"{stage or 'all'} of {recipe}, killed and resumed", resume, {}))
    return commands


def part_c(out: Path, data: Path, small: bool) -> list[Command]:
    shapes = ["small"] if small else ["124m", "135m", "360m"]
    return [(f"speed {s}", measured("speed", out / f"speed-{s}.json", s), {}) for s in shapes]


def part_d(out: Path, data: Path, small: bool) -> list[Command]:
    """The recipes' learning rates were set for their own budgets; these are more of the same updates."""
    hh, reviews = data / "hh-rlhf" / "helpful-base", data / "imdb"
    one_kind = ["stage.rm.experts=none", "stage.rm2.experts=none"]
    settings = {
        "hh-smollm2": [f"data.name={hh}", *one_kind, *FOR_A_CARD],
        "sentiment": [f"data.name={reviews}"],
    }
    commands: list[Command] = []
    if small:
        commands, standins = [stand_ins(out, small)], out / "standins"
        reviews = standins / "reviews.jsonl"
        model = [
            f"model.base={standins / 'model'}",
            "data.max_prompt_length=40",
            "data.max_response_length=16",
        ]
        settings = {
            "hh-smollm2": [
                *model, *few(), *one_kind, f"data.name={standins / 'pairs.jsonl'}", "model.trainable=top:1",
                "stage.rm2.rows=16", "stage.ppo.critic_warmup=0",
            ],
            "sentiment": [
                *model, *few(("ppo", "grpo", "ceiling")), f"data.name={reviews}", "model.trainable=top:1",
                "stage.pairs.rows=16", "stage.best.rows=16", "evaluation.pool=4",
            ],
        }  # fmt: skip
    for recipe, words in settings.items():
        run = cli("run", recipe, "--out", str(out / recipe), "precision=bf16", *words)
        commands.append((recipe, run, {"PREFTUNE_REVIEWS": str(reviews)}))
    return commands


def part_e(out: Path, data: Path, small: bool) -> list[Command]:
    place, model, pairs = out / "hh-colab", out / "standins" / "model", out / "standins" / "pairs.jsonl"
    words = [f"model.base={model}", f"data.name={pairs}", "data.data_dir=none"]
    fewer = [*few(), "data.max_prompt_length=40", "data.max_response_length=16"] if small else []
    run = ["run", "hh-colab", "--out", str(place), *words, *fewer]
    return [stand_ins(out, small), ("hh-colab, capped", measured("capped", out / "capped.json", *run), {})]


def stand_ins(out: Path, small: bool) -> Command:
    return "stand-ins", measured("standins", out / "standins", small=small), {}


def few(online: Sequence[str] = ("ppo", "grpo")) -> list[str]:
    """Settings that leave a recipe a few rows and a step of each stage."""
    words = ["stage.rm.rows=32", "stage.sft.rows=16", "stage.dpo.rows=16", "evaluation.prompts=8"]
    words += [f"stage.{s}.{n}" for s in online for n in ("steps=1", "max_new_tokens=4")]
    return [*words, "evaluation.max_new_tokens=4"]


PARTS: dict[str, Callable[[Path, Path, bool], list[Command]]] = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
    "e": part_e,
}


def machine(device: str) -> dict[str, str]:
    """Card, driver, versions."""
    import torch
    import transformers

    found = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "card": platform.processor() or platform.machine()}
    if device == "cuda":
        ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"card": said or torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}
    return found


def carry_out(
    part: str, commands: list[Command], record: dict[str, Any], on: dict[str, str], save: Any, site: Path
) -> bool:
    """Run what is not done yet, within the part's time; whether all went well. `site`: more packages."""
    ends, well = time.monotonic() + PART_SECONDS, True
    for name, words, more in commands:
        key = f"{part} {name}"
        known = record["commands"].get(key, {})
        if known.get("ok") and known.get("words") == words and known.get("machine") == on:
            continue
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{site}", **more}
        if on["device"] == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        began = time.monotonic()
        try:
            left = max(ends - began, 1)
            done = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=left
            )
            code, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            code, said = -1, f"not done within the {PART_SECONDS} s of a part; the same command goes on"
        seconds = round(time.monotonic() - began, 1)
        entry = {"ok": code == 0, "code": code, "seconds": seconds, "words": words, "machine": on}
        record["commands"][key] = entry | {"date": f"{datetime.now(UTC):%Y-%m-%d}", "said": said[-2000:]}
        well = well and code == 0
        save()
        print(f"{'ok  ' if code == 0 else 'FAIL'}  {key}  {seconds} s", flush=True)
    return well


def page(record: dict[str, Any], out: Path) -> str:
    """docs/gpu.md."""
    lines = ["# On a GPU", "", "Made by `make gpu-proof`; do not edit.", ""]
    if not record["commands"]:
        return "\n".join([*lines, (HERE / "never_run.md").read_text(encoding="utf-8")])
    names = "part", "command", "went well", "seconds", "card", "torch", "date"
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for key, entry in sorted(record["commands"].items()):
        part, name = key.split(" ", 1)
        on = entry["machine"]
        verdict = "yes" if entry["ok"] else f"no (exit {entry['code']})"
        cells = (part, name, verdict, str(entry["seconds"]), on["card"], on["torch"], entry["date"])
        lines.append(f"| {' | '.join(cells)} |")
    for file in sorted(out.glob("*.json")):
        if file.name not in ("proof.json", "selftest.json"):
            lines += ["", f"## {file.stem}", "", "```json", file.read_text(encoding="utf-8").strip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--page", type=Path, help="write the page here too")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    out, data = given.out.resolve(), given.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = out / "site"
    if taken := wheels.unpack(HERE / "wheels", site):
        print("unpacked:", ", ".join(taken))
        sys.path.insert(0, str(site))
    file = out / "proof.json"
    record = json.loads(file.read_text()) if file.is_file() else {"commands": {}}

    def save() -> None:
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        draft.replace(file)

    on, well = machine(given.device), True
    for part in given.parts or PARTS:
        well = carry_out(part, PARTS[part](out, data, given.small), record, on, save, site) and well
    text = page(record, out)
    for target in filter(None, (out / "gpu.md", given.page)):
        target.write_text(text, encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
