"""PPO and GRPO against exact policy gradients of a tabular policy, and against the optima they should find.

Vocabulary 3, responses of length 2: nine responses, so that expectations are sums over all of them, in
float64. No token is EOS here. n below is the number of sampled tokens, N of responses, K of a group.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from scipy.optimize import fsolve
from torch import Tensor

from preftune.algorithms import ALGORITHMS, PPO
from preftune.config import OptimizerConfig, PPOConfig
from preftune.data import Prompts, Sequences, pad_prompts
from preftune.functional import (
    kl_estimate,
    leave_one_out_advantages,
    ppo_policy_loss,
    sequence_mean,
    weighted_sum,
)
from preftune.models.roles import Critic, Policy, Reference
from preftune.rollout.rollout import Rollout
from preftune.training.learner import Learner
from tiny import Judge, Recorder, Tabular, runner

LOGITS = torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.8, -0.4], [-0.6, 0.1, 0.2], [0.4, 0.0, -0.9]])
REFERENCE = torch.tensor([[0.0, 0.4, -0.1], [0.2, 0.0, 0.1], [0.3, -0.5, 0.0], [0.0, 0.3, 0.3]])
VALUES = torch.tensor([[0.2], [0.1], [-0.3], [0.4]])
SCORES = torch.tensor([[0.5, -0.3, 0.8], [-0.2, 1.1, 0.0], [0.4, -0.9, 0.6]])  # of responses (a, b)
RESPONSES = list(product(range(3), range(3)))
KL_COEF, N, BATCHES, K = 0.3, 1024, 24, 4


def score(batch: Sequences) -> Tensor:
    return SCORES[batch.ids[:, 1], batch.ids[:, 2]]


def prompts(count: int, which: int) -> Prompts:
    return pad_prompts([[0]] * count, range(which * count, (which + 1) * count), 0)


def exact_gradient(objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """d objective(log π, log π_ref) / d logits, (4, 3); both arguments are (4, 3) log-probabilities."""
    table = LOGITS.double().requires_grad_()
    value = objective(torch.log_softmax(table, -1), torch.log_softmax(REFERENCE.double(), -1))
    return torch.autograd.grad(value, table)[0]


def expectation(logp: Tensor, of: Callable[[int, int], Tensor]) -> Tensor:
    """Σ_y π(y) of(y) over the nine responses."""
    terms = [(logp[0, a] + logp[1 + a, b]).exp() * of(a, b) for a, b in RESPONSES]
    return torch.stack(terms).sum()


def penalised_return(logp: Tensor, reference: Tensor) -> Tensor:
    """J = E[score] - KL_COEF · KL(π || π_ref) of whole responses: what PPO ascends."""

    def of(a: int, b: int) -> Tensor:
        log_ratio = logp[0, a] - reference[0, a] + logp[1 + a, b] - reference[1 + a, b]
        return SCORES[a, b].double() - KL_COEF * log_ratio

    return expectation(logp, of)


def mean_score(logp: Tensor, reference: Tensor) -> Tensor:
    return expectation(logp, lambda a, b: SCORES[a, b].double())


def assert_converges(samples: list[Tensor], exact: Tensor) -> None:
    """The mean of the samples is within 4 standard errors in each entry, and the errors are small: under 4%
    in all.
    """
    stacked = torch.stack(samples).double()
    error = stacked.std(0) / len(samples) ** 0.5
    assert error.norm() < 0.04 * exact.norm()
    assert ((stacked.mean(0) - exact).abs() <= 4 * error + 1e-9).all()


def test_the_mean_of_ppo_gradients_is_the_policy_gradient() -> None:
    """With λ = γ = 1, A_t = Σ_{k>=t} R_k - V(s_t): V is a baseline, so E[-2 ∇L] = ∇J, up to what whitening
    does.

    The token mean divides by n = 2N, hence the 2. Whitening divides by the batch's sd, which is multiplied
    back here, and subtracts the batch mean, which contains the token itself: a bias of order 1/n = 1/2048,
    below the error.
    """
    exact = exact_gradient(penalised_return)
    gradients = []
    for i in range(BATCHES):
        models = {
            "policy": Policy(Tabular(LOGITS)),
            "reference": Reference(Tabular(REFERENCE)),
            "critic": Critic(Tabular(VALUES)),
        }
        made, recorders = runner("ppo", models, N, lam=1.0, kl_coef=KL_COEF, max_new_tokens=2)
        made.scorer = Judge(score)
        rollout = made.rollout(prompts(N, i))
        reward = -KL_COEF * (rollout.logprobs - rollout.reference_logprobs)[:, 1:]
        reward[:, 1] += score(rollout.sequences)
        to_go = torch.stack([reward.sum(1), reward[:, 1]], 1)
        raw = to_go - torch.stack([VALUES[0].expand(N), VALUES[1 + rollout.sequences.ids[:, 1], 0]], 1)
        made.improve(rollout)
        gradients.append(-2 * raw.std() * recorders["policy"].steps[0]["head.weight"].T)
    assert_converges(gradients, exact)


def grpo(**config: float | str) -> tuple[Any, dict[str, Recorder]]:
    models = {"policy": Policy(Tabular(LOGITS)), "reference": Reference(Tabular(REFERENCE))}
    made, recorders = runner("grpo", models, N, scale="none", max_new_tokens=2, **config)
    made.scorer = Judge(score)
    return made, recorders


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    """Groups of K responses, by which the tests that follow compare what is made of them."""
    made, _ = grpo()
    return [made.rollout(prompts(N // K, i)) for i in range(BATCHES)]


def grpo_gradients(rollouts: list[Rollout], **config: float | str) -> list[Tensor]:
    gradients = []
    for rollout in rollouts:
        made, recorders = grpo(**config)
        made.improve(rollout)
        gradients.append(recorders["policy"].steps[0]["head.weight"].T)
    return gradients


def test_the_mean_of_grpo_gradients_is_the_policy_gradient_times_a_known_factor(
    rollouts: list[Rollout],
) -> None:
    """Without std the group mean contains the response itself: E[-2 ∇L] = (K - 1)/K · ∇E[score], exactly."""
    exact = exact_gradient(mean_score) * (K - 1) / K
    assert_converges([-2 * g for g in grpo_gradients(rollouts, kl_coef=0.0)], exact)


@pytest.mark.parametrize("kl", ["k2", "k3_ratio"])
def test_two_kl_losses_have_the_gradient_of_the_reverse_kl_of_each_state(
    rollouts: list[Rollout], kl: str
) -> None:
    """E[2 ∇(kl term)] = Σ_s d(s) ∇KL(π(.|s) || π_ref(.|s)), with the visits d(s) held fixed.

    The difference to the gradient of the sequence KL, which PPO's penalty has, is that an early token is not
    held to account for the KL of the states it leads to.
    """

    def state_kl(logp: Tensor, reference: Tensor) -> Tensor:
        kl_of = (logp.exp() * (logp - reference)).sum(-1)
        visits = torch.cat([torch.ones(1), torch.softmax(LOGITS[0], -1)]).double()
        return (visits * kl_of).sum()

    exact = exact_gradient(mean_score) * (K - 1) / K - KL_COEF * exact_gradient(state_kl)
    assert_converges([-2 * g for g in grpo_gradients(rollouts, kl_coef=KL_COEF, kl=kl)], exact)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(rollouts: list[Rollout]) -> None:
    """∇k3 = (1 - π_ref/π) ∇log π, whose mean is -Σ_a π_ref ∇log π = ∇KL(π_ref || π) of each state, not of
    KL(π || π_ref).
    """

    def forward_kl(logp: Tensor, reference: Tensor) -> Tensor:
        visits = torch.cat([torch.ones(1), torch.softmax(LOGITS[0], -1)]).double()
        return (visits * (reference.exp() * (reference - logp)).sum(-1)).sum()

    exact = exact_gradient(mean_score) * (K - 1) / K - KL_COEF * exact_gradient(forward_kl)
    assert_converges([-2 * g for g in grpo_gradients(rollouts, kl_coef=KL_COEF, kl="k3")], exact)


def test_the_mean_of_rloo_gradients_is_the_policy_gradient(rollouts: list[Rollout]) -> None:
    """Leave-one-out needs no factor: E[-∇L] = ∇J, with k1 in the score and the ratio of the sums."""
    exact = exact_gradient(penalised_return)
    gradients = []
    for rollout in rollouts:
        policy, reference = Policy(Tabular(LOGITS)), Reference(Tabular(REFERENCE))
        batch = rollout.sequences
        logprobs = policy.logprobs(batch)
        k1 = kl_estimate(logprobs.detach(), reference.logprobs(batch), "k1").sum(1)
        advantages = leave_one_out_advantages(score(batch) - KL_COEF * k1, K)
        terms = ppo_policy_loss(
            logprobs, logprobs.detach(), advantages, level="sequence_sum", mask=batch.response
        )
        weighted_sum(terms, sequence_mean(batch.response)).backward()
        gradients.append(-policy.model.head.weight.grad.T)
    assert_converges(gradients, exact)


# A bandit: one token, scores r, reference p. What each setting should end in is known.
R = torch.tensor([0.6, 0.0, -0.4])
P = torch.tensor([0.2, 0.5, 0.3])
BETA, STEPS, ROWS = 0.5, 120, 256
OPTIMIZER = OptimizerConfig(warmup=0.0, schedule="linear", final=0.0, max_grad_norm=1e9)


def tilted(beta: float) -> Tensor:
    """π* ∝ π_ref exp(r/β): the maximum of E[r] - β KL(π || π_ref)."""
    return torch.softmax(P.log() + R / beta, -1)


def solve(algorithm: str, **config: float | str) -> Tensor:
    """The policy after `STEPS` steps from the reference, its learning rate falling to 0."""
    table = P.log().unsqueeze(0)
    models = {"policy": Policy(Tabular(table)), "reference": Reference(Tabular(table))}
    config = {"kl_coef": BETA, "max_new_tokens": 1, "batch_size": ROWS, "microbatch_size": ROWS, **config}
    learner, judge = Learner(), Judge(lambda batch: R[batch.ids[:, 1]])
    learner.train("policy", models["policy"], OPTIMIZER, 0.05)
    per_prompt = 1
    if algorithm == "ppo":
        models["critic"] = Critic(Tabular(torch.zeros(1, 1)))
        learner.train("critic", models["critic"], OPTIMIZER, 0.05)
        made: Any = PPO(PPOConfig(minibatches=1, epochs=1, **config), models, learner, judge)
    else:
        kind = ALGORITHMS[algorithm]
        made = kind(kind.Config(**config), models, learner, judge)
        per_prompt = made.config.group_size
    for i in range(STEPS):
        learner.set_progress(i, STEPS)
        made.step(prompts(ROWS // per_prompt, i))
    return torch.softmax(models["policy"].model.table[0].detach(), -1)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return 0.5 * (p - q).abs().sum().item()


SETTINGS = {
    # k1 in the reward: the gradient of the objective itself; whitening scales it and so does not move its
    # zero.
    "ppo": ({}, tilted(BETA)),
    # The group mean takes a share 1/K of the score's gradient and none of the KL's: as if β were K/(K - 1) β.
    # The same gradient, and no baseline that holds the response itself: no factor.
    "rloo": ({"group_size": 4}, tilted(BETA)),
    "grpo k2": ({"kl": "k2", "scale": "none", "group_size": 2}, tilted(BETA * 2)),
    "grpo k3 times ratio": ({"kl": "k3_ratio", "scale": "none", "group_size": 4}, tilted(BETA * 4 / 3)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bandit_is_solved_to_the_tilted_reference(name: str) -> None:
    config, expected = SETTINGS[name]
    assert distance(P, expected) > 0.1
    assert distance(solve(name.split()[0], **config), expected) < 0.025


def test_default_grpo_ends_in_a_fixed_point_of_its_own() -> None:
    """k3 as a loss and the group's std, with K = 2.

    A pair has advantages ±1/√2 by which of the two scores higher (eps aside), 0 for a tie, so that
    E[A | a] = Σ_b π_b sign(r_a - r_b) / √2 =: g_a(π), with E[g] = 0; k3 pulls with β ∇KL(π_ref || π). The
    gradient in logit a is π_a g_a - β (π_a - p_a), zero at the fixed point: not the tilted reference.
    """
    sign = torch.sign(R.unsqueeze(1) - R.unsqueeze(0)).double()

    def residual(logits: list[float]) -> list[float]:
        pi = torch.softmax(torch.tensor([*logits, 0.0], dtype=torch.float64), -1)
        gradient = pi * (sign @ pi) / 2**0.5 - 0.5 * (pi - P.double())
        return gradient[:2].tolist()

    root = fsolve(residual, [0.0, 0.0], xtol=1e-12)
    expected = torch.softmax(torch.tensor([*root, 0.0]), -1).float()
    got = solve("grpo", group_size=2, kl_coef=0.5)
    assert distance(expected, P) > 0.1
    assert distance(expected, tilted(0.5)) > 0.05
    assert distance(got, expected) < 0.015
