"""What a second process brings, beside what a second core brings: benchmarks/processes.py [--rounds N].

In turns, so that what else the machine does hits all: an SFT update on 16 rows of 128 tokens by one process
with one thread; the same update by two with 8 rows each (whole models, then in parts); a matrix product by
one process; the same product by two at once. The gain of an update over the gain of the products is the share
that sums of gradients, waiting and uneven rows leave. Writes benchmarks/results/processes.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

ROWS, TOKENS, MICROBATCH, WIDTH, LAYERS, VOCABULARY, SIDE = 16, 128, 4, 256, 4, 4096, 1536
WORK = ("alone", "whole", "parts")


def update(shard: bool, distributed: bool) -> Any:
    """A function that makes one update of the real learner."""
    from preftune.algorithms.sft import SFT
    from preftune.config import OptimizerConfig, SFTConfig
    from preftune.data.batch import Sequences
    from preftune.models.roles import Policy
    from preftune.training.learner import Learner

    torch.manual_seed(0)
    size = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": TOKENS}
    policy = Policy(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **size)))
    learner = Learner(microbatch_size=MICROBATCH, shard=shard)
    assert learner.is_alone != distributed
    learner.train("policy", policy, OptimizerConfig(), 1e-4)
    algorithm = SFT(SFTConfig(batch_size=ROWS), {"policy": policy}, learner)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    real = torch.ones_like(ids, dtype=torch.bool)
    batch = learner.place(Sequences(ids, real, real & (torch.arange(TOKENS) > 0)))
    return lambda: algorithm.step(batch)


def serve(kind: str, rank: int, port: int, ear: Connection) -> None:
    """Do what is asked for, and say when it began and ended."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if kind != "alone":
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    left = torch.randn(SIDE, SIDE)
    work = {"product": lambda: left @ left, "update": update(kind == "parts", kind != "alone")}
    for each in work.values():
        each()
    ear.send("ready")
    while (asked := ear.recv()) is not None:
        began = time.monotonic(), time.process_time()
        work[asked]()
        ear.send((time.monotonic() - began[0], time.process_time() - began[1]))


def measure(ears: list[Connection], what: str) -> tuple[float, float]:
    """Seconds until all have done it, by the clock and of the busiest process."""
    for ear in ears:
        ear.send(what)
    said = [ear.recv() for ear in ears]
    return max(each[0] for each in said), max(each[1] for each in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    context, workers = multiprocessing.get_context("spawn"), dict[str, list[Connection]]()
    started = []
    for kind in WORK:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        workers[kind] = []
        for rank in range(1 if kind == "alone" else 2):
            ours, theirs = context.Pipe()
            started.append(context.Process(target=serve, args=(kind, rank, port, theirs), daemon=True))
            started[-1].start()
            workers[kind].append(ours)
        assert [ear.recv() for ear in workers[kind]] == ["ready"] * len(workers[kind])
    load, rows = os.getloadavg()[0], []
    for _ in range(rounds):
        row = {f"update_{kind}": measure(workers[kind], "update") for kind in WORK}
        row["product_one"] = measure(workers["whole"][:1], "product")
        row["product_two"] = measure(workers["whole"], "product")
        rows.append(row)
    for ear in (ear for ears in workers.values() for ear in ears):
        ear.send(None)
    write(rows, load)


def write(rows: list[dict[str, tuple[float, float]]], load: float) -> None:
    """Medians over rounds of each gain, by the clock (0) and by processor time (1), lowest and highest."""
    found: dict[str, Any] = {}
    for place, clock in enumerate(("clock", "processor")):
        product = [2 * row["product_one"][place] / row["product_two"][place] for row in rows]
        found[clock] = {"products": spread(product)}
        for kind in WORK[1:]:
            gain = [row["update_alone"][place] / row[f"update_{kind}"][place] for row in rows]
            found[clock][kind] = spread(gain)
            found[clock][f"{kind}_over_products"] = spread(
                [a / b for a, b in zip(gain, product, strict=True)]
            )
    facts = {"n": len(rows), "load": load, "cores": os.cpu_count(), "machine": platform.processor()}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    result = {**facts, **found, "rounds": rows}
    (Path(__file__).parent / "results" / "processes.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**facts, **found}, indent=1))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
