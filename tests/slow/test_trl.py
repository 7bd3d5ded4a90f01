"""A saved reward model as TRL's `reward_funcs`: `make trl-check`, in an environment of its own.

TRL decodes completions without special tokens before it scores them, so the end token is gone: its rewards
are our scores of the text *without* EOS. The target last ran on 2026-11-22: 3 passed with trl 1.16.0,
torch 2.13.0, transformers 5.23.0.
"""

from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs TRL: make trl-check")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

import preftune  # noqa: E402

PROMPTS = [f"\n\nHuman: What is {a} and {b}?\n\nAssistant:" for a, b in ((1, 2), (30, 4), (5, 66), (7, 8))]
LONGEST = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and a reward model of the recipe `tiny`."""
    out = tmp_path_factory.mktemp("trl") / "run"
    preftune.train_reward_model("tiny", out=str(out))
    return out


@pytest.fixture(scope="module")
def step(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """One GRPO step of TRL: its prompts, completions and rewards as it logs them."""
    tokenizer = AutoTokenizer.from_pretrained(run / "models" / "policy_sft", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.GRPOTrainer(
        model=str(run / "models" / "policy_sft"),
        reward_funcs=str(run / "models" / "reward_model"),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("out")),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=LONGEST,
            max_steps=1,
            log_completions=True,
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=0,
        ),
    )
    trainer.train()
    logs = trainer._logs
    (rewards,) = logs["rewards"].values()
    return {
        "prompts": list(logs["prompt"]),
        "completions": list(logs["completion"]),
        "rewards": list(rewards),
    }


def test_trl_gives_our_score_of_the_text_without_its_end(run: Path, step: dict[str, list]) -> None:
    model = preftune.load_reward_model(run / "models" / "reward_model")
    ours = model.raw_score(step["prompts"], step["completions"], ended=False)
    assert len(ours) == 8
    torch.testing.assert_close(torch.tensor(step["rewards"]), ours, atol=1e-4, rtol=0)


def test_the_gap_that_the_card_states_is_there(run: Path, step: dict[str, list]) -> None:
    model = preftune.load_reward_model(run / "models" / "reward_model")
    ended = model.raw_score(step["prompts"], step["completions"], ended=True)
    assert (ended - torch.tensor(step["rewards"])).abs().min() > 1e-4
    card = (run / "models" / "reward_model" / "README.md").read_text(encoding="utf-8")
    assert "TRL's trainers drop that token" in card


def test_with_the_end_token_kept_plain_transformers_gives_our_score(run: Path, step: dict[str, list]) -> None:
    directory = run / "models" / "reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [p + c + tokenizer.eos_token for p, c in zip(step["prompts"], step["completions"], strict=True)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    ours = preftune.load_reward_model(directory).raw_score(step["prompts"], step["completions"], ended=True)
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=0)
