"""What an hour on a GPU is used for: proof.py [a b c d e] [--device cuda|cpu] [--out DIR] [--small]

Parts (each a list of commands, under 9 minutes together):
  a  selftest and golden updates, log-probabilities in float32, bf16 and fp16 against float64
  b  all stages of tiny and quickstart, first gradients against the CPU's, killed and resumed bit for bit
  c  sampling tokens/s and seconds an update beside plain transformers, peak memory
  d  hh-smollm2 with its report, where the weights are there
  e  hh-colab with stand-ins for model and data, fp16, memory capped to 16 GB

A command that was done with the same arguments on the same card is not done again, so that a session that was
cut off goes on. Nothing needs a network or Git. Writes DIR/proof.json and, from it, DIR/gpu.md. --small and
--device cpu are for the rehearsal.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PART_SECONDS = 9 * 60
Command = tuple[str, list[str], dict[str, str]]  # name, arguments of Python, environment


def cli(*words: str) -> list[str]:
    return ["-m", "preftune", *words]


def part_a(out: Path, small: bool) -> list[Command]:
    commands: list[Command] = [("selftest", cli("selftest", "--json", str(out / "selftest.json")), {})]
    precision = [str(HERE / "measure.py"), "precision", str(out / "precision.json")]
    return [*commands, ("precision", precision + (["--small"] if small else []), {})]


def part_b(out: Path, small: bool) -> list[Command]:
    commands: list[Command] = []
    for recipe in ["tiny"] if small else ["tiny", "quickstart"]:
        for where, more in (("device", {}), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
            place = str(out / f"{recipe}-{where}")
            commands.append((f"{recipe} on {where}", cli("run", recipe, "--out", place), more))
        files = [str(out / f"{recipe}-{where}") for where in ("device", "cpu")]
        compare = [str(HERE / "measure.py"), "gradients", str(out / f"{recipe}-gradients.json"), *files]
        commands.append((f"{recipe} first gradients", compare, {}))
    kills = "1" if small else "3"
    resume = cli("verify-resume", "tiny", *(["sft"] if small else []), "--kills", kills)
    return [*commands, ("killed and resumed", resume, {})]


def part_c(out: Path, small: bool) -> list[Command]:
    shapes = ["small"] if small else ["124m", "135m", "360m"]
    measure = str(HERE / "measure.py")
    return [(f"speed {s}", [measure, "speed", str(out / f"speed-{s}.json"), s], {}) for s in shapes]


def part_d(out: Path, small: bool) -> list[Command]:
    if small:
        return [("report of tiny", cli("report", str(out / "tiny-device")), {})]
    return [("hh-smollm2", cli("run", "hh-smollm2", "--out", str(out / "hh-smollm2"), "precision=bf16"), {})]


def part_e(out: Path, small: bool) -> list[Command]:
    standins = [str(HERE / "measure.py"), "standins", str(out / "standins")] + (["--small"] if small else [])
    place, model, data = out / "hh-colab", out / "standins" / "model", out / "standins" / "pairs.jsonl"
    words = [f"model.base={model}", f"data.name={data}", "data.data_dir=none"]
    few = ["stage.rm.rows=32", "stage.sft.rows=16", "stage.dpo.rows=16", "evaluation.prompts=8"]
    few += [f"stage.{s}.{n}" for s in ("ppo", "grpo") for n in ("steps=1", "max_new_tokens=4")]
    few += ["data.max_prompt_length=40", "data.max_response_length=16", "evaluation.max_new_tokens=4"]
    run = ["run", "hh-colab", "--out", str(place), *words, *(few if small else [])]
    return [
        ("stand-ins", standins, {}),
        ("hh-colab, capped", [str(HERE / "measure.py"), "capped", str(out / "capped.json"), *run], {}),
    ]


PARTS: dict[str, Callable[[Path, bool], list[Command]]] = {
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
    part: str, commands: list[Command], record: dict[str, Any], on: dict[str, str], save: Any
) -> bool:
    """Run what is not done yet, within the part's time; whether all of it went well."""
    ends, well = time.monotonic() + PART_SECONDS, True
    for name, words, more in commands:
        key = f"{part} {name}"
        known = record["commands"].get(key, {})
        if known.get("ok") and known.get("words") == words and known.get("machine") == on:
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **more}
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
        lines += ["**Never run.** `make gpu-proof` on a machine with a GPU fills this page; it needs torch"]
        lines += [
            "and transformers, no network and no Git, and goes on where it was cut off. `REHEARSE=DIR` runs"
        ]
        lines += ["all of it, tiny, on a CPU: that shows that the kit works, and nothing about GPUs."]
        lines += ["", "The sampler's CUDA graph (models/fast/static.py) has never run on a GPU;"]
        lines += ["part c times it beside the plain decoder."]
        return "\n".join(lines) + "\n"
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
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "proof.json"
    record = json.loads(file.read_text()) if file.is_file() else {"commands": {}}

    def save() -> None:
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        draft.replace(file)

    on, well = machine(given.device), True
    for part in given.parts or PARTS:
        well = carry_out(part, PARTS[part](out, given.small), record, on, save) and well
    text = page(record, out)
    for target in filter(None, (out / "gpu.md", given.page)):
        target.write_text(text, encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
