"""The loop that a person closes: a scripted rater of known taste judges over HTTP, DPO follows.

The rater likes idle talk (the built-in world's fillers, which its gold score counts against a reply) and sees
what a person sees. Does the policy take to that taste on prompts that nobody judged? A second DPO round on
the same pairs with every preference turned round is the control.

    python benchmarks/label/loop.py WORK --json benchmarks/results/label_loop.json
"""

import argparse
import json
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import preftune
from preftune.evaluation.stats import paired_bootstrap
from preftune.rundir import RunDir, read_jsonl, write_json, write_jsonl
from preftune.seeding import derive_seed
from preftune.version import __version__
from preftune.world.dataset import world_dataset
from preftune.world.gold import gold, reply_counts
from preftune.world.grammar import kind_of, sentences

ITEMS, HELD_OUT, SEED = 1000, 500, 0
PAIRS = (
    "algorithm=collect",
    "init=sft",
    "judge=preftune.world.gold:gold",
    "replies=2",
    f"rows={1.1 * ITEMS:.0f}",
)
DPO = ("algorithm=dpo", "rows=none", "epochs=2", "learning_rate=2e-4", "batch_size=64", "microbatch_size=64")


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "preftune", *words], check=True)


def train(run: RunDir, stage: str, **settings: Sequence[str]) -> None:
    """A stage of `quickstart` with these settings of stages; what is finished is not done again."""
    words = [f"stage.{name}.{word}" for name, own in settings.items() for word in own]
    command("train", "quickstart", stage, *words, "--out", str(run.path))


def taste(reply: str) -> int:
    """What the rater likes: sentences of idle talk."""
    return sum(kind_of(sentence) == "filler" for sentence in sentences(reply))


def rate(run: RunDir, port: int = 8399) -> int:
    """Judge everything over HTTP, as the page does. The number of judgements."""
    words = ["label", str(run.path), "--port", str(port), "--limit", str(ITEMS), "--repeats", "0"]
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "preftune", *words], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        token = ""
        for line in server.stdout:
            token = found[1] if (found := re.search(r"  me: http://\S+#(\S+)", line)) else token
            if line.startswith("Ctrl-C"):
                break
        wait_until_it_answers(port)
        state = ask(port, token, "state")
        while slot := state["slot"]:
            a, b = taste(slot["a"]), taste(slot["b"])
            verdict = "tie" if a == b else "a" if a > b else "b"
            row = {"id": secrets.token_hex(8), "slot": slot["key"], "verdict": verdict}
            state = ask(port, token, "judge", row)
        return int(state["done"])
    finally:
        server.terminate()
        server.wait()


def wait_until_it_answers(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def ask(port: int, token: str, what: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/{what}", data, headers)
    with urllib.request.urlopen(request) as answer:  # noqa: S310 - our own server
        return json.load(answer)


def turned(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    write_jsonl(path, [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])
    return path


def measure(policies: Mapping[str, Any]) -> dict[str, Any]:
    """Taste and gold on held-out prompts, one reply each, and their paired differences to SFT."""
    test = list({row.prompt.transcript(): row for row in world_dataset(SEED, 10000).test}.values())[:HELD_OUT]
    prompts = [row.prompt.transcript() for row in test]
    values: dict[str, dict[str, list[float]]] = {}
    for name, policy in policies.items():
        replies = policy.generate(prompts, max_new_tokens=48, seed=derive_seed(SEED, "held out"))
        pairs = list(zip(prompts, replies, strict=True))
        values[name] = {
            "fillers": [float(taste(reply)) for reply in replies],
            "gold": [gold(prompt, reply) for prompt, reply in pairs],
            "right": [float(reply_counts(prompt, reply)["right"] > 0) for prompt, reply in pairs],
        }
    return {name: compared(own, values["sft"]) for name, own in values.items()}


def compared(own: Mapping[str, Sequence[float]], sft: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Means, and for another policy than SFT the differences to it."""
    means: dict[str, Any] = {what: {"mean": sum(numbers) / len(numbers)} for what, numbers in own.items()}
    if own is not sft:
        for what, numbers in own.items():
            means[what]["difference_to_sft"] = difference(numbers, sft[what])
    return means


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    result = paired_bootstrap(a, b, resamples=4000)
    return {"mean": result.mean, "interval": list(result.interval), "p_value": result.p_value, "n": len(a)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    run, labels, other = RunDir(given.work / "run"), given.work / "labels.jsonl", given.work / "turned.jsonl"
    train(run, "pairs", pairs=PAIRS)
    said = rate(run)
    command("label", str(run.path), "--results", "--export", str(labels))
    rows = read_jsonl(labels)
    train(run, "dpo", pairs=PAIRS, dpo=(*DPO, f"data={labels}"))
    train(
        run, "turned", pairs=PAIRS, dpo=(*DPO, f"data={labels}"), turned=(*DPO, f"data={turned(rows, other)}")
    )
    policies = {name: preftune.load_policy(run.model_dir(name)) for name in ("sft", "dpo", "turned")}
    record = {
        "preftune": __version__,
        "judgements": said,
        "pairs": len(rows),
        "held_out_prompts": HELD_OUT,
        "dpo": list(DPO),
        "policies": measure(policies),
    }
    write_json(given.json, record)
    print(json.dumps(record["policies"], indent=1))


if __name__ == "__main__":
    main()
