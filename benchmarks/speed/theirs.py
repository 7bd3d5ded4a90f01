"""TRL's side (1.16), and Hugging Face generate: one stage, step by step, through TRL's own trainers.

Usage: theirs.py WORK_DIRECTORY STAGE, in an environment that holds trl. A step is what lies between two
calls of `on_step_end`: fetching and collating a batch, forward, backward, optimizer, metrics.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from work import (
    BETA,
    GROUP,
    KL_COEF,
    LEARNING_RATE,
    NEW_TOKENS,
    PROMPTS,
    SHIFT,
    Channel,
    batch,
    fixed,
    frozen,
    load,
)


class Stepper(TrainerCallback):
    """Hands control to the parent between steps."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.losses, self.tokens = channel, [], []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.channel.say(ready=True)
        self.channel.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        facts: dict[str, Any] = {"loss": sum(map(float, self.losses)) / max(len(self.losses), 1)}
        if self.tokens:
            facts["new_tokens"] = sum(map(int, self.tokens))
        self.losses, self.tokens = [], []
        self.channel.done(**facts)


def watch(trainer: Any, stepper: Stepper) -> Any:
    """Keep the losses of microbatches, and the order of rows as it is."""
    usual = trainer.compute_loss

    def recording(*args: Any, **kwargs: Any) -> Any:
        out = usual(*args, **kwargs)
        stepper.losses.append((out[0] if isinstance(out, tuple) else out).detach())
        return out

    trainer.compute_loss = recording
    return trainer


def as_given(self: Any, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
    return dataset


def in_order(self: Any, dataset: Any = None) -> Any:
    return torch.utils.data.SequentialSampler(self.train_dataset)


def rows(work: dict[str, Any], columns: Any, cycles: int = 40) -> Dataset:
    """One long epoch: the steps, over and over."""
    size = batch(work)
    order = [i for _ in range(cycles) for step in work["steps"] for i in step[:size]]
    table = [columns(row) for row in work["rows"]]
    return Dataset.from_list([table[i] for i in order])


def adapter(work: dict[str, Any]) -> Any:
    """LoRA on all linear layers below the head, where the work has a "lora"."""
    if "lora" not in work:
        return None
    from peft import LoraConfig

    return LoraConfig(
        **work["lora"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM", bias="none"
    )


def common(work: dict[str, Any], directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "trl"),
        "per_device_train_batch_size": batch(work),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "dataloader_pin_memory": False,
    }


def trainer_for(stage: str, directory: Path, work: dict[str, Any], stepper: Stepper) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory / "lm")
    tokenizer.pad_token = tokenizer.eos_token
    shared = common(work, directory)

    def lm() -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory / "lm", dtype=torch.float32)
        return frozen(model, work)

    def rm() -> Any:
        kind = AutoModelForSequenceClassification
        return frozen(kind.from_pretrained(directory / "rm", num_labels=1, dtype=torch.float32), work)

    match stage:
        case "sft":
            SFTTrainer._get_train_sampler = in_order
            data = rows(
                work,
                lambda r: {
                    "input_ids": r["prompt"] + r["chosen"],
                    "labels": [-100] * len(r["prompt"]) + r["chosen"],
                },
            )
            args = SFTConfig(**shared, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
            return SFTTrainer(lm(), args, train_dataset=data, processing_class=tokenizer, callbacks=[stepper])
        case "reward":
            RewardTrainer._get_train_sampler = in_order
            RewardTrainer._prepare_dataset = as_given
            data = rows(
                work,
                lambda r: {
                    "chosen_ids": r["prompt"] + r["chosen"],
                    "rejected_ids": r["prompt"] + r["rejected"],
                },
            )
            padded = AutoTokenizer.from_pretrained(directory / "rm")
            args = RewardConfig(**shared, max_length=None)
            return RewardTrainer(rm(), args, train_dataset=data, processing_class=padded, callbacks=[stepper])
        case "dpo" | "dpo_cached":
            DPOTrainer._get_train_sampler = in_order
            DPOTrainer._prepare_dataset = as_given
            cached = stage == "dpo_cached"
            data = rows(
                work,
                lambda r: {
                    "prompt_ids": r["prompt"],
                    "chosen_ids": r["chosen"],
                    "rejected_ids": r["rejected"],
                },
                1 if cached else 40,
            )
            shared["num_train_epochs"] = 40 if cached else 1
            args = DPOConfig(**shared, max_length=None, beta=BETA, precompute_ref_log_probs=cached)
            return DPOTrainer(
                lm(),
                ref_model=None if "lora" in work else lm(),
                args=args,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[stepper],
                peft_config=adapter(work),
            )
    order = [i for _ in range(40) for step in work["steps"] for i in step[:PROMPTS]]
    data = Dataset.from_list([{"prompt": work["rows"][i]["text"][0]} for i in order])
    shared |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": PROMPTS * GROUP // 8}
    args = GRPOConfig(
        **shared,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        beta=KL_COEF,
        temperature=1.0,
        shuffle_dataset=False,
        loss_type="grpo",
    )
    trainer = GRPOTrainer(
        lm(),
        reward_funcs=rm(),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        reward_processing_classes=AutoTokenizer.from_pretrained(directory / "rm"),
        callbacks=[stepper],
    )
    count_tokens(trainer, stepper)
    return trainer


@torch.no_grad()
def grpo_loss(trainer: Any, work: dict[str, Any]) -> float:
    """What `equal.grpo_loss` computes, by TRL's own loss."""
    prompts, responses = fixed(work)
    width = max(map(len, responses))
    inputs = {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
        "completion_ids": torch.tensor([r + [0] * (width - len(r)) for r in responses]),
        "completion_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in responses]),
        "advantages": torch.tensor([0.5, -0.5]).repeat(len(prompts) // 2),
        "num_items_in_batch": torch.tensor(sum(map(len, responses))),
    }
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    model = trainer.model.eval()
    before = trainer._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
    for parameter in model.parameters():
        parameter.mul_(SHIFT)
    inputs |= {"old_per_token_logps": before, "ref_per_token_logps": before}
    return float(trainer._compute_loss(model, inputs))


def count_tokens(trainer: Any, stepper: Stepper) -> None:
    usual = trainer._generate_and_score_completions

    def counting(*args: Any, **kwargs: Any) -> Any:
        out = usual(*args, **kwargs)
        stepper.tokens.append(out["completion_mask"].sum())
        return out

    trainer._generate_and_score_completions = counting


def generate(model: Any, prompts: list[list[int]], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face generate on left-padded rows, each prompt k times: ids and attention, (B, T)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).repeat_interleave(k, 0)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(k, 0)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out, torch.nn.functional.pad(mask, (0, out.shape[1] - width), value=1)


@torch.no_grad()
def measure(policy: Any, reference: Any, judge: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Samples, exact KL and k1 by full forwards over the vocabulary, and scores."""
    ids, mask = generate(policy, prompts, 1)
    start = ids.shape[1] - NEW_TOKENS
    places = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = (
        torch.log_softmax(m(ids, attention_mask=mask, position_ids=places).logits[:, start - 1 : -1], -1)
        for m in (policy, reference)
    )
    exact = (ours.exp() * (ours - theirs)).sum(-1).sum(1)
    k1 = (ours - theirs).gather(-1, ids[:, start:, None]).squeeze(-1).sum(1)
    scores = judge(ids, attention_mask=mask, position_ids=places).logits.squeeze(-1)
    return {"new_tokens": ids[:, start:].numel(), "kl": [float(x.mean()) for x in (exact, k1, scores)]}


def steps(work: dict[str, Any]) -> Iterator[list[int]]:
    while True:
        yield from work["steps"]


def by_hand(stage: str, directory: Path, work: dict[str, Any], channel: Channel) -> None:
    """Generation and evaluation, for which TRL has no trainer: model.generate."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(directory / "lm", dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(directory / "lm", dtype=torch.float32).eval()
    judge = AutoModelForSequenceClassification.from_pretrained(directory / "rm", num_labels=1).eval()
    channel.say(ready=True)
    channel.wait()
    for part in steps(work):
        prompts = [work["rows"][i]["prompt"] for i in part]
        if stage == "evaluate":
            channel.done(**measure(policy, reference, judge, prompts))
            continue
        one = stage == "generate_groups"
        with torch.no_grad():
            out, _ = generate(policy, prompts[:1] if one else prompts[:GROUP], GROUP if one else 1)
        channel.done(new_tokens=len(out) * NEW_TOKENS)


def main() -> None:
    channel = Channel()
    directory, stage = Path(sys.argv[1]), sys.argv[2]
    work = load(directory)
    if stage in ("generate_groups", "generate_distinct", "evaluate"):
        by_hand(stage, directory, work, channel)
        return
    if stage == "grpo_loss":
        trainer = trainer_for(stage, directory, work, Stepper(channel))
        channel.say(ready=True)
        channel.wait()
        channel.done(loss=grpo_loss(trainer, work))
    else:
        stepper = Stepper(channel)
        watch(trainer_for(stage, directory, work, stepper), stepper).train()


if __name__ == "__main__":
    main()
