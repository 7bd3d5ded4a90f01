"""TRL's PPO, from 1.12.0, the last release that has it. Usage: theirs_ppo.py WORK_DIRECTORY ppo"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from work import KL_COEF, LEARNING_RATE, NEW_TOKENS, PROMPTS, Channel, frozen, load


class Stepper(TrainerCallback):
    """Hands control to the parent between steps."""

    def __init__(self, channel: Channel, rows: int) -> None:
        self.channel, self.rows = channel, rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.channel.say(ready=True)
        self.channel.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.channel.done(new_tokens=self.rows * NEW_TOKENS)  # it has no stop token: every row is that long


def main() -> None:
    channel, directory = Channel(), Path(sys.argv[1])
    work, size = load(directory), PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(directory / "lm", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    order = [i for _ in range(40) for step in work["steps"] for i in step[:size]]
    data = Dataset.from_list([{"input_ids": work["rows"][i]["prompt"]} for i in order])
    args = PPOConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        local_rollout_forward_batch_size=size,
        total_episodes=len(order),
        num_sample_generations=0,
        response_length=NEW_TOKENS,
        temperature=1.0,
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )

    def lm() -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory / "lm", dtype=torch.float32)
        return frozen(model, work)

    def rm() -> Any:
        kind = AutoModelForSequenceClassification
        return frozen(kind.from_pretrained(directory / "rm", num_labels=1, dtype=torch.float32), work)

    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=lm(),
        ref_model=lm(),
        reward_model=rm(),
        value_model=rm(),
        train_dataset=data,
        eval_dataset=data.select(range(size)),
        callbacks=[Stepper(channel, size)],
    )
    in_order = torch.utils.data.DataLoader(
        data, batch_size=size, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    trainer.train()


if __name__ == "__main__":
    main()
