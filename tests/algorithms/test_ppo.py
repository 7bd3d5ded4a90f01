"""PPO: the first minibatch, and a two-step example worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import preftune
from preftune.algorithms import PPO
from preftune.algorithms.ppo import Experience
from preftune.config import PPOConfig
from preftune.data import Sequences, pad_prompts, pad_sequences
from preftune.models.roles import Critic, Policy
from preftune.rollout import Rollout
from preftune.training.learner import Learner
from tiny import EOS, Judge, Tabular, prompts, relative, roles, rollout, runner


def scores_by_rule(batch: Sequences) -> Tensor:
    """Something that differs between responses."""
    return ((batch.ids == 7) & batch.response).sum(1).float() - batch.response.sum(1) / 5


def step(temperature: float, **config: int | float) -> dict[str, float]:
    """A whole step from prompts: sampled, scored, looked up, and updated with recording optimizers."""
    models = roles("ppo")
    made, _ = runner("ppo", models, 3, temperature=temperature, max_new_tokens=10, **config)
    made.scorer = Judge(scores_by_rule)
    return made.step(prompts(3, 8))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_first_minibatch_has_ratio_1_and_clips_nothing(temperature: float, minibatches: int) -> None:
    metrics = step(temperature, epochs=2, minibatches=minibatches)
    assert metrics["first/val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["first/policy/clipfrac_avg"] == 0.0


def test_the_first_full_batch_has_policy_loss_0_because_advantages_are_whitened_over_it() -> None:
    metrics = step(0.7, epochs=1, minibatches=1)
    assert metrics["loss/policy_avg"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
    assert metrics["grad_norm"] > 0.01


def test_advantages_are_whitened_over_the_response_tokens_of_the_rollout() -> None:
    made, _ = runner("ppo", roles("ppo"))
    batch = rollout(5)
    experience = made.experience(batch)
    own = experience.advantages[batch.sequences.response]
    assert own.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert own.var().item() == pytest.approx(1.0, abs=1e-5)
    assert (experience.advantages[~batch.sequences.response] == 0).all()
    assert own.numel() == batch.sequences.response.sum()


def test_returns_do_not_depend_on_values_where_lambda_is_1() -> None:
    """ret_t = Σ_{k>=t} R_k; with no penalty each token's return is the score, before any whitening."""
    made, _ = runner("ppo", roles("ppo"), lam=1.0, kl_coef=0.0)
    batch = rollout(5)
    returns = made.experience(batch).returns
    expected = batch.scores.unsqueeze(1) * batch.sequences.response
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=0)


def test_the_reference_enters_through_the_reward() -> None:
    """Nothing changes the advantages but k1, and the loss has no KL term of its own."""
    made, _ = runner("ppo", roles("ppo"), kl_coef=0.1, lam=1.0)
    batch = rollout(5)
    penalty = 0.1 * (batch.logprobs - batch.reference_logprobs)
    remaining = penalty.flip(1).cumsum(1).flip(1) * batch.sequences.response
    expected = batch.scores.unsqueeze(1) * batch.sequences.response - remaining
    torch.testing.assert_close(made.experience(batch).returns, expected, atol=1e-5, rtol=0)
    report = made.report(batch, made.experience(batch))
    assert report["objective/kl"] == pytest.approx((penalty / 0.1).sum(1).mean().item(), abs=1e-5)
    assert report["objective/rlhf_reward"] == pytest.approx(
        (batch.scores - penalty.sum(1)).mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("count", [2, 8])
def test_the_report_on_several_responses(count: int) -> None:
    made, _ = runner("ppo", roles("ppo"))
    batch = rollout(5)[:count]
    report = made.report(batch, made.experience(batch))
    assert report["objective/scores_std"] == pytest.approx(batch.scores.std().item(), abs=1e-6)
    sampled = -(batch.logprobs * batch.sequences.response).sum() / count
    assert report["objective/entropy"] == pytest.approx(sampled.item(), abs=1e-5)


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    made, _ = runner("ppo", roles("ppo"), epochs=3, minibatches=4, lam=1.0, kl_coef=0.0)
    numbered = replace(
        rollout(5), scores=torch.arange(8.0)
    )  # with these settings a return is the row's number
    seen: list[list[int]] = []

    def update(part: Experience) -> dict[str, float]:
        seen.append([round(float(row.max())) for row in part.returns])
        return {"policy/clipfrac_avg": 0.0, "val/ratio": 1.0}

    made.update = update
    made.improve(numbered, seed=1)
    epochs = [[row for part in seen[i : i + 4] for row in part] for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(part) for part in seen] == [2] * 12


def test_the_value_loss_does_not_reach_the_policy() -> None:
    made, recorders = runner("ppo", roles("ppo"))
    made.improve(rollout(5))
    other, again = runner("ppo", roles("ppo"), value_clip=None)
    other.improve(rollout(5))
    assert relative(again["policy"].steps[0], recorders["policy"].steps[0]) == 0.0
    assert relative(again["critic"].steps[0], recorders["critic"].steps[0]) > 1e-3


@pytest.mark.parametrize("clip", [0.1, 0.3])
@torch.no_grad()
def test_the_ratio_is_clipped_on_both_sides(clip: float) -> None:
    made, _ = runner("ppo", roles("ppo"), clip=clip)
    batch = made.experience(rollout(5))
    ratio = (made.policy.logprobs(batch.sequences) - batch.logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = made.policy_loss(batch)
    expected = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    torch.testing.assert_close(loss.terms, expected * batch.sequences.response, atol=1e-5, rtol=0)
    lower = clipped * batch.advantages < ratio * batch.advantages  # where the clipped side is the minimum
    assert torch.equal(loss.metrics["policy/clipfrac_avg"], lower.float() * batch.sequences.response)
    indifferent = made.policy_loss(replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert not indifferent.metrics["policy/clipfrac_avg"].any()


def test_two_steps_by_hand() -> None:
    """One response of two tokens from a vocabulary of three; policy and critic are tables.

    Settings: kl_coef 0.1, γ 1, λ 0.5, clip 0.2, value_clip 0.2, score 1.
    The response is (0, 1). When it was sampled:
        π_old(y1) = 1/2, π_old(y2) = 1/4; π_ref = 1/4 for both; V_old = 0.5, 0.3.
    k1_1 = ln(1/2) - ln(1/4) = ln 2 = 0.693147, k1_2 = 0.
    Rewards: R_1 = -0.1 · 0.693147 = -0.0693147, R_2 = 0 + 1 = 1.
    GAE, from the end: δ_2 = 1 - 0.3 = 0.7, A_2 = 0.7.
        δ_1 = -0.0693147 + 0.3 - 0.5 = -0.2693147, A_1 = -0.2693147 + 0.5 · 0.7 = 0.0806853.
    Returns A + V: 0.5806853 and 1.0.
    Whitening two numbers with n - 1: mean 0.3903426, deviations ∓0.3096574, var 2 · 0.3096574² / 1,
        so (∓0.3096574) / (√2 · 0.3096574) = ∓1/√2 = ∓0.7071068.
    The policy has moved since: π(y1) = 0.55, π(y2) = 0.35. Ratios 1.1 and 1.4.
        term 1: A < 0: -min(1.1 · -0.7071068, 1.1 · -0.7071068) = 0.7778175
        term 2: A > 0: -min(1.4 · 0.7071068, 1.2 · 0.7071068) = -0.8485281, clipped: no gradient
        loss = (0.7778175 - 0.8485281) / 2 = -0.0353553; clip fraction 1/2; mean ratio 1.25
        approximate KL, mean of ρ - 1 - ln ρ: (0.1 - 0.0953102 + 0.4 - 0.3364722) / 2 = 0.0341088
    The critic has moved: V = 0.9 (clipped to 0.5 + 0.2 = 0.7) and 0.35 (0.05 away, not clipped).
        term 1: ½ max((0.9 - 0.5806853)², (0.7 - 0.5806853)²) = ½ · 0.3193147² = 0.0509809
        term 2: ½ (0.35 - 1)² = 0.2112500
        loss = (0.0509809 + 0.21125) / 2 = 0.1311155; clip fraction 1/2
    Entropy. Sampled: -ln(1/2) - ln(1/4) = 2.0794415. Exact, of the two states as they are now:
        0.9972711 (0.55, 0.25, 0.20) and 1.0805276 (0.40, 0.35, 0.25), mean 1.0388994.
    Gradients. Policy, in the first state: dL/d log π(y1) = ½ · 1.1 · 0.7071068 = 0.3889087, and
        d log π(y1) / d logits = onehot - π = (0.45, -0.25, -0.20) at π = (0.55, 0.25, 0.20):
        (0.1750089, -0.0972272, -0.0777817), norm 0.2147819. Everything else 0.
        Critic: ½ · 0.3193147 = 0.1596574 and ½ · (0.35 - 1) = -0.325, norm 0.3620998.
    Both norms are below 1, so nothing is clipped, and SGD with rate 1 subtracts the gradients:
        first-state logits - (0.1750089, -0.0972272, -0.0777817); V = 0.7403426 and 0.675.
    """
    first, second = torch.tensor([0.55, 0.25, 0.20]), torch.tensor([0.40, 0.35, 0.25])
    logits = torch.stack([first, second, second, second]).log()
    policy = Policy(Tabular(logits))
    critic = Critic(Tabular(torch.tensor([[0.9], [0.35], [0.0], [0.0]])))
    rows = Rollout(
        sequences=pad_sequences([[0]], [[0, 1]], 0),
        logprobs=torch.tensor([[0.0, math.log(1 / 2), math.log(1 / 4)]]),
        reference_logprobs=torch.tensor([[0.0, math.log(1 / 4), math.log(1 / 4)]]),
        values=torch.tensor([[0.0, 0.5, 0.3]]),
        scores=torch.tensor([1.0]),
    )
    metrics = preftune.one_update(
        "ppo",
        {"policy": policy, "critic": critic},
        rows,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        kl_coef=0.1,
        gamma=1.0,
        lam=0.5,
        clip=0.2,
        value_clip=0.2,
    )
    expected = {
        "loss/policy_avg": -0.0353553,
        "loss/value_avg": 0.1311155,
        "policy/clipfrac_avg": 0.5,
        "val/clipfrac_avg": 0.5,
        "val/ratio": 1.25,
        "policy/approxkl_avg": 0.0341088,
        "grad_norm": 0.2147819,
        "grad_norm/critic": 0.3620998,
        "objective/kl": 0.6931472,
        "objective/non_score_reward": -0.0693147,
        "objective/rlhf_reward": 0.9306853,
        "objective/scores": 1.0,
        "objective/scores_std": 0.0,
        "objective/entropy": 2.0794415,
        "policy/entropy_avg": 1.0388994,
        "first/val/ratio": 1.25,
        "first/policy/clipfrac_avg": 0.5,
        "kl_coef": 0.1,
        "completions/mean_length": 2.0,
        # 1 - var(returns - V_old) / var(returns) = 1 - 0.1917754 / 0.0879124
        "val/explained_variance": -1.1814365,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=2e-6), name
    assert "loss" not in metrics  # there are two
    moved = logits.clone()
    moved[0] -= torch.tensor([0.1750089, -0.0972272, -0.0777817])
    torch.testing.assert_close(policy.model.table.detach(), moved, atol=1e-6, rtol=0)
    values = torch.tensor([[0.7403426], [0.675], [0.0], [0.0]])
    torch.testing.assert_close(critic.model.table.detach(), values, atol=1e-6, rtol=0)


def test_ppo_learns_what_is_scored() -> None:
    """A tabular policy, three prompts' worth of sampling, real optimizer and loop order: token 1 pays."""
    models = {
        "policy": Policy(Tabular(torch.zeros(4, 3))),
        "reference": Policy(Tabular(torch.zeros(4, 3))),
        "critic": Critic(Tabular(torch.zeros(4, 1))),
    }
    config = PPOConfig(batch_size=32, max_new_tokens=2, kl_coef=0.0, minibatches=1)
    learner = Learner(microbatch_size=32)
    for name, rate in (("policy", 0.05), ("critic", 0.05)):
        learner.train(name, models[name], config.optimizer, rate)
    judge = Judge(lambda batch: (batch.ids[:, 1:] == 1).sum(1).float(), eos_id=EOS)
    made = PPO(config, models, learner, judge)

    before = made.step(pad_prompts([[0]] * 32, range(32), 0))["objective/scores"]
    for i in range(1, 12):
        after = made.step(pad_prompts([[0]] * 32, range(i * 32, i * 32 + 32), 0))["objective/scores"]
    assert before == pytest.approx(2 / 3, abs=0.4)
    assert after > 1.7
