"""What a second process brings, beside what a second core brings: benchmarks/processes.py [--rounds N].

In turns, so that what else the machine does hits all: an SFT update by one process with one thread; the same
update by two with half of the rows each (whole models, then in parts); a matrix product by one process; the
same product by two at once. The gain of an update over the gain of the products is the share that sums of
gradients, waiting and uneven rows leave. Three shapes: one made up (few tokens for its weights), quickstart's
SFT (hardly any weights, rows as long as its own), and what SFT of sentiment trains (six blocks of
SmolLM2-135M above frozen embeddings; not in parts). Sampling by the first shape, too: whole models, models in
parts that are gathered at once, and block by block (`parallel.gather`). 5 rounds take 75 s of two idle cores.
Writes benchmarks/results/processes.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIDE, PRODUCTS = 1536, 4
KINDS = ("alone", "whole", "parts")
# rows, shortest, longest row, rows of a microbatch, updates at a time
SHAPES = {
    "made_up": (16, 128, 128, 4, 1),
    "quickstart": (64, 26, 42, 64, 5),
    "sentiment": (16, 52, 52, 16, 1),
}
IN_PARTS = ("made_up", "quickstart")
PROMPTS, NEW = 16, 32


def network(shape: str) -> Any:
    """A network of the shape, the same in every process."""
    torch.manual_seed(0)
    if shape == "sentiment":
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 49152}
        model = LlamaForCausalLM(LlamaConfig(**size, **heads))
        model.get_input_embeddings().weight.requires_grad_(False)
        return model
    width, layers, vocabulary = (64, 2, 139) if shape == "quickstart" else (256, 4, 4096)
    size = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 128, "vocab_size": vocabulary}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def update(shape: str, shard: bool) -> Callable[[], Any]:
    """A function that makes updates of the real learner."""
    from preftune.algorithms.sft import SFT
    from preftune.config import OptimizerConfig, SFTConfig
    from preftune.data.batch import Sequences
    from preftune.models.roles import Policy
    from preftune.training.learner import Learner

    rows, shortest, longest, microbatch, times = SHAPES[shape]
    policy = Policy(network(shape))
    learner = Learner(microbatch_size=microbatch, shard=shard)
    learner.train("policy", policy, OptimizerConfig(), 1e-4)
    algorithm = SFT(SFTConfig(batch_size=rows), {"policy": policy}, learner)
    lengths = torch.randint(shortest, longest + 1, (rows, 1))
    ids = torch.randint(1, policy.model.config.vocab_size, (rows, int(lengths.max())))
    columns = torch.arange(ids.shape[1])
    batch = learner.place(Sequences(ids, columns < lengths, (columns < lengths) & (columns > 0)))
    return lambda: [algorithm.step(batch) for _ in range(times)]


def draw(by_block: bool, shard: bool) -> Callable[[], Any]:
    """A function that samples replies, none of which ends early."""
    from preftune.data.batch import pad_prompts
    from preftune.models.roles import Policy
    from preftune.models.shards import readable
    from preftune.rollout.sample import sample
    from preftune.training.learner import Learner

    policy, learner = Policy(network("made_up")), Learner(shard=shard, by_block=by_block)
    learner.freeze(policy)
    learner.shard_frozen([policy])
    ids = torch.randint(1, 4096, (PROMPTS, 32)).tolist()
    prompts = learner.place(pad_prompts(ids, range(PROMPTS), 0))

    def drawn() -> None:
        with readable(policy):
            sample(policy, prompts, max_new_tokens=NEW, temperature=1.0, eos_id=5000)

    return drawn


def serve(kind: str, rank: int, port: int, ear: Connection) -> None:
    """Do what is asked for, and say how long it took."""
    from preftune.models.memory import keep_freed_memory

    keep_freed_memory()  # as a run does
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if kind != "alone":
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    left = torch.randn(SIDE, SIDE)
    parts = kind == "parts"
    work: dict[str, Callable[[], Any]] = {
        shape: update(shape, parts) for shape in (IN_PARTS if parts else SHAPES)
    }
    work["product"] = lambda: [left @ left for _ in range(PRODUCTS)]
    work["sampling"] = draw(False, parts)
    if parts:
        work["sampling_by_block"] = draw(True, parts)
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


def begun() -> dict[str, list[Connection]]:
    """The processes of every kind, ready."""
    context, workers = multiprocessing.get_context("spawn"), dict[str, list[Connection]]()
    for kind in KINDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        workers[kind] = []
        for rank in range(1 if kind == "alone" else 2):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(kind, rank, port, theirs), daemon=True).start()
            workers[kind].append(ours)
    assert all(ear.recv() == "ready" for ears in workers.values() for ear in ears)
    return workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    load, workers, rows = os.getloadavg()[0], begun(), []
    for _ in range(rounds):
        row = {"product_one": measure(workers["whole"][:1], "product")}
        row["product_two"] = measure(workers["whole"], "product")
        for kind in KINDS:
            shapes = IN_PARTS if kind == "parts" else SHAPES
            row |= {f"{shape}_{kind}": measure(workers[kind], shape) for shape in shapes}
            row[f"sampling_{kind}"] = measure(workers[kind], "sampling")
        row["sampling_by_block"] = measure(workers["parts"], "sampling_by_block")
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
        for shape, kind in [
            *((shape, "whole") for shape in SHAPES),
            *((shape, "parts") for shape in IN_PARTS),
        ]:
            gain = [row[f"{shape}_alone"][place] / row[f"{shape}_{kind}"][place] for row in rows]
            share = [a / b for a, b in zip(gain, product, strict=True)]
            found[clock][f"{shape}_{kind}"] = {"gain": spread(gain), "over_products": spread(share)}
        for kind in (*KINDS, "by_block"):
            found[clock][f"sampling_{kind}"] = spread([row[f"sampling_{kind}"][place] for row in rows])
    facts = {"n": len(rows), "load": load, "cores": os.cpu_count(), "machine": platform.processor()}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    result = {**facts, **found, "rounds": rows}
    (Path(__file__).parent / "results" / "processes.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**facts, **found}, indent=1))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
