"""Makes tests/models/lora_golden.safetensors: the first step of TRL's trainers with a LoRA adapter of peft's.

    make lora-golden        (an environment of its own with TRL 1.16.0 and peft; seconds once it is there)

Model and batch are those of preftune's selftest (src/preftune/selftest/data): GPT-2 of two layers, four
pairs, one step of AdamW at 1e-3, gradient norm clipped to 1. Adapters of rank 2 on all linear layers, A and
B both random: with B = 0, as peft begins, no A would have a gradient. No code of preftune takes part. Tensors
are called ALGORITHM/begin|grad|after/PARAMETER (gradients after clipping), losses and norms are metadata.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "src" / "preftune" / "selftest" / "data"
TARGET = ROOT / "tests" / "models" / "lora_golden.safetensors"
GOLDEN = json.loads((DATA / "end_to_end.json").read_text(encoding="utf-8"))
WEIGHTS = safetensors.torch.load((DATA / "weights.safetensors").read_bytes())
RANK, ALPHA, BETA = 2, 8, 0.1


class Keeper(TrainerCallback):
    """What the trained parameters were before the step, their gradients, and what they were after it."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def keep(self, what: str, model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensor = parameter.grad if what == "grad" else parameter
                self.found[f"{what}/{name}"] = tensor.detach().clone()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.keep("begin", model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.keep("grad", model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.keep("after", model)


def weights(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}/"): x for key, x in WEIGHTS.items() if key.startswith(f"{name}/")}


def causal_lm() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(**GOLDEN["config"]))
    model.load_state_dict(weights("policy"), strict=False)
    model.tie_weights()
    return model


def reward_model() -> GPT2ForSequenceClassification:
    model = GPT2ForSequenceClassification(GPT2Config(**{**GOLDEN["config"], "num_labels": 1}))
    model.load_state_dict(weights("policy") | weights("reward_model"))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainers want one; rows are given as ids."""
    words = {f"w{i}": i for i in range(2, GOLDEN["config"]["vocab_size"])}
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, **words}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **ends)


def adapter(kind: str) -> LoraConfig:
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type=kind,
        init_lora_weights=False,
        **({"modules_to_save": ["score"]} if kind == "SEQ_CLS" else {}),
    )


def trainer(algorithm: str, directory: str, keeper: Keeper) -> Any:
    rows = GOLDEN["batch"]
    shared = {**GOLDEN["trainer_args"], "output_dir": directory}
    given = {"processing_class": tokenizer(), "callbacks": [keeper]}
    if algorithm == "sft":
        data = [
            {
                "input_ids": row["prompt_ids"] + row["chosen_ids"],
                "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
            }
            for row in rows
        ]
        args = SFTConfig(**shared, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        kind, model, made = SFTTrainer, causal_lm(), adapter("CAUSAL_LM")
    elif algorithm == "dpo":
        DPOTrainer._prepare_dataset = lambda self, dataset, *_, **__: dataset
        data = [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
        args = DPOConfig(**shared, max_length=None, beta=BETA)
        kind, model, made = DPOTrainer, causal_lm(), adapter("CAUSAL_LM")
    else:
        RewardTrainer._prepare_dataset = lambda self, dataset, *_, **__: dataset
        data = [
            {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows
        ]
        args = RewardConfig(**shared, max_length=None)
        kind, model, made = RewardTrainer, reward_model(), adapter("SEQ_CLS")
    return kind(model, args=args, train_dataset=Dataset.from_list(data), peft_config=made, **given)


def main() -> int:
    torch.set_num_threads(1)
    tensors, facts = dict[str, torch.Tensor](), dict[str, Any]()
    for algorithm in ("sft", "dpo", "reward"):
        torch.manual_seed(0)
        keeper = Keeper()
        with tempfile.TemporaryDirectory() as directory:
            made = trainer(algorithm, directory, keeper)
            made.train()
        logs = next(row for row in made.state.log_history if "loss" in row)
        facts[algorithm] = {name: logs[name] for name in ("loss", "grad_norm")}
        tensors |= {f"{algorithm}/{name}": x.contiguous() for name, x in keeper.found.items()}
    packages = ("trl", "peft", "torch", "transformers")
    metadata = {"logs": json.dumps(facts), "versions": json.dumps({name: version(name) for name in packages})}
    metadata |= {"rank": str(RANK), "alpha": str(ALPHA), "beta": str(BETA)}
    safetensors.torch.save_file(tensors, TARGET, metadata)
    print(TARGET, TARGET.stat().st_size, metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
