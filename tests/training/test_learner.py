"""The learner: weights, schedules, and what it does with an update that is not finite."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from preftune.algorithms import PPO, SFT
from preftune.algorithms.base import Loss, Metrics, averaged
from preftune.config import OptimizerConfig, PPOConfig, SFTConfig
from preftune.data import Sequences
from preftune.errors import ConfigError, PreftuneError
from preftune.functional import token_mean
from preftune.models.roles import Policy
from preftune.stops import Interrupted
from preftune.training import checkpoint
from preftune.training.adamw import schedule_factor
from preftune.training.learner import Learner
from preftune.training.loop import Plan, train
from tiny import NO_CLIPPING, Recorder, causal_lm, flat, roles, rollout, same_weights, sequences, state


def sft(learner: Learner, policy: Policy, rate: float = 1e-2) -> SFT:
    learner.train("policy", policy, OptimizerConfig(), rate)
    return SFT(SFTConfig(), {"policy": policy}, learner)


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
def test_an_update_is_the_gradient_of_the_weighted_sum(microbatch_size: int | None) -> None:
    """Any weights, microbatches of different widths; a per-row metric is averaged over rows, a per-token one
    by weight.
    """
    batch, policy = sequences(5, 7), Policy(causal_lm(1))
    weights = torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) * batch.response
    learner, recorder = Learner(microbatch_size=microbatch_size), Recorder(policy.model)
    learner.adopt("policy", policy, recorder, NO_CLIPPING)

    def loss(part: Sequences) -> Loss:
        terms = policy.logprobs(part)
        return Loss(terms, {"first id": part.ids[:, 0].float(), "token": terms.detach()})

    metrics = learner.update("policy", batch, weights, loss)
    other = Policy(causal_lm(1))
    expected = (other.logprobs(batch) * weights).sum()
    expected.backward()
    gradient = {name: p.grad for name, p in other.model.named_parameters()}
    assert (flat(recorder.steps[0]) - flat(gradient)).norm() / flat(gradient).norm() < 1e-6
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["first id"] == pytest.approx(batch.ids[:, 0].float().mean().item(), rel=1e-5)
    assert metrics["token"] == pytest.approx((expected / weights.sum()).item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(flat(gradient).norm().item(), rel=1e-5)


def test_gradients_are_shortened_to_the_limit_and_the_norm_before_that_is_reported() -> None:
    policy = Policy(causal_lm(1))
    learner, recorder = Learner(), Recorder(policy.model)
    learner.adopt("policy", policy, recorder, OptimizerConfig(max_grad_norm=0.01))
    batch = sequences(5)
    metrics = learner.update(
        "policy", batch, token_mean(batch.response), lambda part: Loss(-policy.logprobs(part))
    )
    assert metrics["grad_norm"] > 0.1
    assert flat(recorder.steps[0]).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("constant", 0.0, [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 0.2, [1 / 3, 2 / 3, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("cosine", 0.0, [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]),
    ],
)
def test_schedules(schedule: str, final: float, expected: list[float]) -> None:
    """Ten steps, two of them warm-up: it rises in equal parts and reaches 1 at the third."""
    settings = OptimizerConfig(warmup=0.2, schedule=schedule, final=final)
    assert [schedule_factor(settings, i, 10) for i in range(10)] == pytest.approx(expected)


def test_no_step_is_wasted_on_a_rate_of_zero() -> None:
    for warmup in (0.0, 0.05, 1.0):
        for steps in (1, 2, 7):
            assert all(schedule_factor(OptimizerConfig(warmup=warmup), i, steps) > 0 for i in range(steps))


def test_the_rate_is_set_on_every_optimizer() -> None:
    models = roles("ppo")
    learner = Learner()
    learner.train("policy", models["policy"], OptimizerConfig(warmup=0.0), 0.1)
    learner.train("critic", models["critic"], OptimizerConfig(warmup=0.0), 0.4)
    assert learner.set_progress(5, 10) == 0.5
    rates = {name: trained.optimizer.param_groups[0]["lr"] for name, trained in learner.trained.items()}
    assert rates == pytest.approx({"policy": 0.05, "critic": 0.2})


class Poisoned(Policy):
    """A policy whose log-probs turn NaN on demand."""

    __slots__ = ("poison",)

    def logprobs_and_entropy(self, batch: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        logprobs, entropy = super().logprobs_and_entropy(batch, temperature)
        return logprobs * (math.nan if self.poison else 1.0), entropy


def poisoned() -> Poisoned:
    policy = Poisoned(causal_lm(1))
    policy.poison = True
    return policy


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    policy = poisoned()
    learner = Learner()
    algorithm = sft(learner, policy)
    before = state(policy.model)
    metrics = algorithm.step(sequences(5))
    assert not math.isfinite(metrics["loss"])
    assert same_weights(state(policy.model), before)
    assert not learner.trained["policy"].optimizer.state_dict()["state"]  # no NaN in the moments either
    policy.poison = False
    algorithm.step(sequences(5))
    assert not same_weights(state(policy.model), before)
    assert all(p.isfinite().all() for p in policy.model.parameters())


def test_what_was_not_finite_is_named() -> None:
    policy = poisoned()
    learner = Learner()
    algorithm = sft(learner, policy)
    algorithm.step(sequences(5))
    assert learner.updates == 0
    assert learner.not_finite == ["policy: loss nan, grad_norm nan"]
    learner.begin_step()
    assert not learner.not_finite


def test_each_role_is_judged_by_itself() -> None:
    """PPO updates policy and critic in turn; the critic's sound updates do not hide the policy's."""
    models = roles("ppo")
    models["policy"] = poisoned()
    learner = Learner()
    for name in ("policy", "critic"):
        learner.train(name, models[name], OptimizerConfig(), 1e-3)
    PPO(PPOConfig(epochs=3, minibatches=1, batch_size=8), models, learner).improve(rollout(5))
    assert [text.split(":")[0] for text in learner.not_finite] == ["policy"] * 3
    assert learner.trained["policy"].skipped == 3
    assert learner.trained["critic"].skipped == 0


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_spares_norms_and_biases(decay_all: bool) -> None:
    """Without a gradient AdamW only decays, by 1 - rate · weight_decay (arXiv:1711.05101, alg. 2)."""
    policy, learner = Policy(causal_lm(1)), Learner()
    learner.train("policy", policy, OptimizerConfig(weight_decay=0.5, decay_all=decay_all), 0.01)
    before, batch = state(policy.model), sequences(5)
    learner.update("policy", batch, torch.zeros(batch.ids.shape), lambda part: Loss(policy.logprobs(part)))
    for name, weight in state(policy.model).items():
        factor = 0.995 if decay_all or weight.dim() > 1 else 1.0
        assert torch.allclose(weight, factor * before[name], rtol=1e-6, atol=0), name


def test_rows_are_shared_as_evenly_as_they_come() -> None:
    """The second of three processes: two of six rows, two of seven, none of one."""
    learner = Learner()
    learner.world, learner.rank, learner.is_alone = 3, 1, False
    for count, own in ((6, slice(2, 4)), (7, slice(2, 4)), (1, slice(0, 0))):
        assert torch.equal(learner.place(sequences(5, count)).ids, sequences(5, count)[own].ids)


def test_runs_of_different_precision_follow_each_other_in_one_process() -> None:
    """A notebook does that; accelerate keeps the first one's precision for good unless told otherwise."""
    for precision in ("float32", "bf16", "float32"):
        policy = Policy(causal_lm(1))
        learner = Learner(precision)
        metrics = sft(learner, policy).step(sequences(5))
        assert math.isfinite(metrics["loss"])
        assert learner.accelerator.mixed_precision == {"float32": "no", "bf16": "bf16"}[precision]
        assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_counts_and_rows_are_plain_on_one_process() -> None:
    learner = Learner()
    assert learner.total(torch.tensor(5.0)).item() == 5.0
    values = torch.arange(4.0)
    assert learner.gather(values) is values
    assert learner.share(values) is values


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launcher_that_shards_models_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=rf"ACCELERATE_USE_{name} is set") as caught:
        Learner()
    assert caught.value.code == 78


def test_what_an_fp16_scaler_skips_is_no_update_and_its_norm_is_left_out() -> None:
    """With a scaler that works on a CPU, and a first gradient that overflows."""
    policy, batch = Policy(causal_lm(1)), sequences(5)
    learner, plain = Learner(), Policy(causal_lm(1))
    accelerator = learner.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    algorithm, before = sft(learner, policy), state(policy.model)
    overflow = policy.model.lm_head.weight.register_hook(lambda gradient: gradient + math.inf)
    rows = [algorithm.step(batch)]
    overflow.remove()
    assert not math.isfinite(rows[0]["grad_norm"])
    assert learner.updates == 0
    assert learner.not_finite == []
    assert same_weights(state(policy.model), before)
    rows.append(algorithm.step(batch))
    assert learner.updates == 1
    wanted = sft(Learner(), plain).step(batch)
    assert rows[1]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert averaged(rows)["grad_norm"] == rows[1]["grad_norm"]
    assert flat(state(policy.model)) == pytest.approx(flat(state(plain.model)), abs=1e-6)


def test_many_updates_that_an_fp16_scaler_skips_count_as_one_bad_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here two. The steps between are none that end the row of bad ones; a step that goes well does."""
    monkeypatch.setattr("preftune.training.learner.MAX_SCALED", 2)
    policy, learner, said = Policy(causal_lm(1)), Learner(), list[str]()
    learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    learner.accelerator.native_amp, learner.accelerator.state._mixed_precision = True, "fp16"
    algorithm, good = sft(learner, policy), 5  # the step of this number, from 1
    now = list[int]()

    def batch_at(step: int) -> Sequences:
        now.append(step + 1)
        return sequences(5)

    policy.model.lm_head.weight.register_hook(lambda grad: grad + (0 if now[-1] == good else math.inf))
    files = {"metrics": tmp_path / "metrics.jsonl", "checkpoints": tmp_path / "checkpoints"}
    plan = Plan(steps=20, **files, checkpoint_every=50, keep=1, say=said.append)
    with pytest.raises(PreftuneError, match="3 steps in a row"):
        train(algorithm, learner, batch_at, plan, lambda step, metrics: None)
    assert [line.split()[2] for line in said if "was skipped" in line] == ["2", "4", "7", "9", "11"]


def test_a_number_beside_a_finite_gradient_is_a_bad_step_with_a_scaler_too() -> None:
    """Nothing is changed, and the next update is made."""
    policy, learner, batch = Policy(causal_lm(1)), Learner(), sequences(5)
    learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    learner.accelerator.native_amp, learner.accelerator.state._mixed_precision = True, "fp16"
    algorithm, before = sft(learner, policy), state(policy.model)
    weights = batch.response / batch.response.sum()
    odd = torch.full(batch.ids.shape, math.nan)
    metrics = learner.update(
        "policy", batch, weights, lambda part: Loss(-policy.logprobs(part), {"odd": odd})
    )
    assert math.isfinite(metrics["grad_norm"])
    assert same_weights(state(policy.model), before)
    assert learner.not_finite == ["policy: odd nan"]
    assert (learner.updates, learner.is_settling, learner.scaler_state()["scale"]) == (0, False, 256.0)
    algorithm.step(batch)
    assert learner.updates == 1
    assert not same_weights(state(policy.model), before)


def test_a_stop_after_an_update_that_the_scaler_skipped_saves_where_the_step_began(tmp_path: Path) -> None:
    """What was skipped is no update, and yet has halved the scale."""
    policy, learner = Policy(causal_lm(1)), Learner()
    learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    learner.accelerator.native_amp, learner.accelerator.state._mixed_precision = True, "fp16"
    algorithm, second = sft(learner, policy), list[float]()

    def step(batch: Sequences) -> Metrics:
        row = algorithm.step(batch)
        if second:
            raise Interrupted(15)
        second.append(math.inf)
        return row

    policy.model.lm_head.weight.register_hook(lambda gradient: gradient + sum(second))
    files = {"metrics": tmp_path / "metrics.jsonl", "checkpoints": tmp_path / "checkpoints"}
    plan = Plan(steps=3, **files, checkpoint_every=50, keep=1, updates=2)
    with pytest.raises(Interrupted):
        train(SimpleNamespace(step=step), learner, lambda step: sequences(5), plan, lambda step, row: None)
    assert (learner.updates, learner.scaler_state()["scale"]) == (0, 128.0)
    assert checkpoint.restore(plan.checkpoints, learner, print) == 1
    assert learner.scaler_state()["scale"] == 256.0


def test_a_role_that_is_taken_again_stops_in_one_place() -> None:
    policy = Policy(causal_lm(1))
    for _ in range(3):
        Learner().freeze(policy)
    assert len(policy.module._forward_pre_hooks) == 1
