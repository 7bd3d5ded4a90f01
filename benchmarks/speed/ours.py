"""preftune's side: one stage, step by step, as `preftune run` does it.

Usage: ours.py WORK_DIRECTORY STAGE [without-kernel]
"""

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoTokenizer

from equal import drift, grpo_loss
from preftune.algorithms import ALGORITHMS
from preftune.config import OptimizerConfig
from preftune.data import Encoder, Preference, Prompts
from preftune.data.hh import parse_prompt
from preftune.evaluation.divergence import divergences
from preftune.models.fast.native import without_kernel
from preftune.models.load import load_causal_lm
from preftune.models.locate import Source
from preftune.models.memory import keep_freed_memory
from preftune.models.roles import Critic, Policy, Reference, RewardModel
from preftune.models.scalar import load_scalar_model
from preftune.rollout.sample import sample
from preftune.rollout.score import Scorer
from preftune.training.learner import Learner
from work import (
    BETA,
    GROUP,
    KL_COEF,
    LEARNING_RATE,
    NEW_TOKENS,
    PROMPT,
    PROMPTS,
    RESPONSE,
    SIZES,
    VOCABULARY,
    Channel,
    load,
)


def steps(work: dict[str, Any]) -> Iterator[list[int]]:
    """Rows of each step, over and over."""
    while True:
        yield from work["steps"]


def _preference(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt=parse_prompt(prompt), chosen=chosen, rejected=rejected, source="hh", row=0)


class Side:
    def __init__(self, directory: Path, stage: str) -> None:
        self.directory, self.stage, self.work = directory, stage, load(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory / "lm")
        self.encoder = Encoder(tokenizer, "transcript", PROMPT, RESPONSE, 1024)
        rows = self.work["rows"]
        self.rows = [_preference(*row["text"]) for row in rows]
        for row, preference in zip(rows, self.rows, strict=True):  # the other side is given token ids
            assert self.encoder.pair(preference) == (row["prompt"], row["chosen"], row["rejected"])
        self.lm, self.rm = Source(str(directory / "lm")), Source(str(directory / "rm"))

    def algorithm(self, name: str, microbatch_size: int, **config: Any) -> Any:
        """The real algorithm on the real learner."""
        made: dict[str, Callable[[], Any]] = {
            "policy": lambda: Policy(load_causal_lm(self.lm)),
            "reference": lambda: Reference(load_causal_lm(self.lm)),
            "reward_model": lambda: RewardModel(load_scalar_model(self.rm)),
            "critic": lambda: Critic(load_scalar_model(self.rm)),
        }
        kind = ALGORITHMS[name]
        learner = Learner(microbatch_size=microbatch_size)
        judges = ["reward_model"] if name in ("grpo", "ppo") else []
        models = {role: made[role]() for role in [*kind.needs, *judges]}
        settings = OptimizerConfig(weight_decay=0.0, max_grad_norm=1.0, beta1=0.9, beta2=0.999, eps=1e-8)
        for role, model in models.items():
            if role in kind.trains:
                learner.train(role, model, settings, LEARNING_RATE)
            else:
                learner.freeze(model)
        config = {"algorithm": name, "microbatch_size": microbatch_size, **config}
        scorers = [Scorer(reward_model=models[role], encoder=self.encoder, translate=None) for role in judges]
        return kind(kind.Config(**config), {role: models[role] for role in kind.needs}, learner, *scorers)

    def offline(self, name: str, **config: Any) -> Callable[[list[int]], dict[str, Any]]:
        size = SIZES[self.work["size"]]["batch"]
        runner = self.algorithm(name, size, batch_size=size, **config)
        log = (self.directory / f"{self.stage}.jsonl").open("a", encoding="utf-8")

        def step(rows: list[int]) -> dict[str, Any]:
            part = [self.rows[i] for i in rows[:size]]
            batch = (
                self.encoder.sequences([(p.prompt, p.chosen) for p in part])
                if name == "sft"
                else self.encoder.pairs(part)
            )
            metrics = runner.step(runner.learner.place(batch))
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            return {"loss": metrics["loss"], "metrics": metrics}

        if self.stage == "dpo_cached":  # the first epoch, before the clock starts
            for rows in self.work["steps"]:
                runner.with_reference(self.encoder.pairs([self.rows[i] for i in rows[:size]]))
        return step

    def prompts(self, rows: list[int]) -> Prompts:
        return self.encoder.prompts(
            [self.rows[i].prompt for i in rows], [random.getrandbits(40) for _ in rows]
        )

    def generate(self, prompts: int, k: int) -> Callable[[list[int]], dict[str, Any]]:
        policy = Policy(load_causal_lm(self.lm))

        def step(rows: list[int]) -> dict[str, Any]:
            batch = self.prompts(rows[:prompts])
            out = sample(
                policy, batch, max_new_tokens=NEW_TOKENS, temperature=1.0, eos_id=-1, responses_per_prompt=k
            )
            return {"new_tokens": int(out.response.sum())}

        return step

    def online(self, name: str) -> Callable[[list[int]], dict[str, Any]]:
        prompts, k = (PROMPTS, GROUP) if name == "grpo" else (PROMPTS, 1)
        more = (
            {"group_size": GROUP, "scale": "group", "reduction": "grpo"} if name == "grpo" else {"epochs": 4}
        )
        runner = self.algorithm(
            name,
            8,
            batch_size=prompts * k,
            max_new_tokens=NEW_TOKENS,
            temperature=1.0,
            kl_coef=KL_COEF,
            missing_eos_score=None,
            minibatches=1,
            **more,
        )

        def step(rows: list[int]) -> dict[str, Any]:
            metrics = runner.step(runner.learner.place(self.prompts(rows[:prompts])))
            return {"metrics": metrics, "new_tokens": metrics["completions/mean_length"] * prompts * k}

        return step

    @torch.no_grad()
    def _measure(
        self, policy: Policy, reference: Reference, judge: RewardModel, rows: list[int]
    ) -> dict[str, Any]:
        never = VOCABULARY  # an id that the policy lacks, and the reward model pads with
        out = sample(policy, self.prompts(rows), max_new_tokens=NEW_TOKENS, temperature=1.0, eos_id=never)
        k1, exact = divergences(policy, reference, out, 1.0)
        scores = judge.normalised(judge.raw_scores(out)).tolist()
        return {"new_tokens": int(out.response.sum()), "kl": [mean(x) for x in (exact, k1, scores)]}

    def evaluate(self) -> Callable[[list[int]], dict[str, Any]]:
        policy, reference = Policy(load_causal_lm(self.lm)), Reference(load_causal_lm(self.lm))
        judge = RewardModel(load_scalar_model(self.rm))
        return lambda rows: self._measure(policy, reference, judge, rows)

    def make(self) -> Callable[[list[int]], dict[str, Any]]:
        match self.stage:
            case "sft" | "reward":
                return self.offline(self.stage)
            case "dpo":
                return self.offline("dpo", beta=BETA)
            case "dpo_cached":
                return self.offline("dpo", beta=BETA, epochs=2)
            case "generate_groups":
                return self.generate(1, GROUP)
            case "generate_distinct":
                return self.generate(GROUP, 1)
            case "evaluate":
                return self.evaluate()
            case "drift":
                policy = Policy(load_causal_lm(self.lm))
                return lambda rows: drift(policy, self.prompts(rows[:GROUP]), 2, str(self.directory / "lm"))
            case "grpo_loss":
                runner = self.algorithm("grpo", 8, reduction="grpo", kl_coef=KL_COEF, group_size=2)
                return lambda rows: grpo_loss(runner, self.work)
        return self.online(self.stage)


def main() -> None:
    channel = Channel()
    torch.manual_seed(0)
    keep_freed_memory()  # as a session does
    side = Side(Path(sys.argv[1]), sys.argv[2])
    step = side.make()
    with without_kernel() if "without-kernel" in sys.argv else contextlib.nullcontext():
        channel.say(ready=True)
        channel.wait()
        for rows in steps(side.work):
            channel.done(**step(rows))


if __name__ == "__main__":
    main()
