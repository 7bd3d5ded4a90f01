"""The same work by TRL and vLLM, where they are installed, and what the card can do: for `measure.py`."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Ids = list[list[int]]


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """The best of three, after one to warm up."""
    spent = []
    for _ in range(times + 1):
        began = time.monotonic()
        work()
        _wait()
        spent.append(time.monotonic() - began)
    return min(spent[1:])


def held_gib() -> float:
    """Memory that is allocated on the card, by whomever in this process."""
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def peak_gib(work: Callable[[], Any], before: float) -> tuple[Any, float | None]:
    """What the work gives, and the most memory that was allocated on the card meanwhile, above `before`: what
    the other side holds is none of its own.
    """
    if not torch.cuda.is_available():
        return work(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = work()
    return found, torch.cuda.max_memory_allocated() / 2**30 - before


def limits(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, float]:
    """FLOP/s of a large product and bytes/s of a large copy, the best of three."""
    n, numbers = (128, 1 << 16) if small else (8192, 1 << 28)
    a, long = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(numbers, device=device)
    flops = 2 * n**3 / seconds_of(lambda: a @ a)
    return {"FLOP/s": flops, "bytes/s": 8 * numbers / seconds_of(long.clone)}


def slowest(work: Callable[[], Any]) -> list[str]:
    """Where the time of one call goes: its fifteen most expensive operations."""
    card = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card else [])]) as seen:
        work()
        _wait()
    order = "self_device_time_total" if card else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: getattr(row, order), reverse=True)[:15]
    return [
        f"{row.key}: {row.count} calls, {row.self_cpu_time_total:.0f} us of the host, "
        f"{row.self_device_time_total:.0f} us of the card"
        for row in rows
    ]


def trl(stage: str, make: Callable[[], Any], rows: dict[str, Ids], half: bool) -> dict[str, Any]:
    """Seconds, first loss and peak memory of an update by TRL's SFTTrainer or DPOTrainer, AdamW at 1e-6; its
    head works on tiles of the logits, as ours does.
    """
    if importlib.util.find_spec("trl") is None:
        return {"installed": False}
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times from one update's end to the next."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _wait()
            self.ends.append(time.monotonic())

    clock, before = Clock(), held_gib()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(stage, make, rows, half, Path(folder))
        trainer.add_callback(clock)
        _, peak = peak_gib(trainer.train, before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    spent = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    return {"installed": True, "seconds an update": min(spent), "first loss": losses[0], "peak GiB": peak}


def _trainer(stage: str, make: Callable[[], Any], rows: dict[str, Ids], half: bool, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    count, updates = len(rows["prompt"]), 4
    common: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": count, "max_steps": updates,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.0,
        "bf16": half, "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(),
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_length": None,
    }  # fmt: skip
    parts = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    model, tokenizer = make(), _tokenizer()
    if stage == "sft":
        data = [
            {"input_ids": r["prompt"] + r["chosen"], "labels": [-100] * len(r["prompt"]) + r["chosen"]}
            for r in parts
        ]
        settings = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
        return SFTTrainer(model, settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    reference = make()
    reference.load_state_dict(model.state_dict())
    data = [{f"{name}_ids": ids for name, ids in r.items()} for r in parts]
    prepared = type("Prepared", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
    settings = DPOConfig(**common, beta=0.1)
    return prepared(
        model, ref_model=reference, args=settings, train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )  # fmt: skip


def _tokenizer() -> Any:
    """One that TRL asks for its pad token only: rows are ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    end = {"eos_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 0})), **end)


def vllm(model: Any, ids: Ids, new: int, half: bool) -> dict[str, Any]:
    """Tokens/s of vLLM on the same prompts; it takes half of the card."""
    if importlib.util.find_spec("vllm") is None:
        return {"installed": False}
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = LLM(
            model=folder, skip_tokenizer_init=True, dtype="bfloat16" if half else "float32",
            gpu_memory_utilization=0.5, enable_prefix_caching=False,
        )  # fmt: skip
        how = SamplingParams(max_tokens=new, ignore_eos=True, temperature=1.0, detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in ids]
        spent = seconds_of(lambda: engine.generate(prompts, how, use_tqdm=False))
    return {"installed": True, "tokens/s": len(ids) * new / spent}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
