"""Every golden entry: values and gradients at 1e-12 in float64, at the file's tolerances in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden import DTYPES, Entry, entry, names, vectors
from preftune import functional as pf

DPO, GAE, PPO, GRPO, KTO = (names(p) for p in ("dpo_family", "gae_", "ppo_losses", "grpo_loss", "kto_"))
ASSEMBLY = names("ppo_reward_assembly")
SINGLE = [
    "selective_logprobs",
    "reward_bradley_terry",
    "kl_estimators",
    "masked_whiten",
    "ppo_reward_at_last_token",
    "response_mask_pad_equals_eos",
    "adaptive_kl_controller",
    "group_advantages",
    "rloo_sequence_loss",
    "simpo_beta2.0_gamma1.0",
    "orpo",
    "evaluation_stats",  # in tests/evaluation/test_stats.py
]


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def masked(e: Entry, name: str = "mask") -> Tensor:
    """The mask in the entry's dtype, so that weights built from it have that dtype."""
    return e[name].to(e.dtype)


def per_row(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0).sum(1)


def shifted(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Our layout of logits that stand at the column of the action they produced: one more column in front."""
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
    return logits, torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)


def test_no_entry_is_left_out() -> None:
    covered = {*SINGLE, *DPO, *GAE, *PPO, *GRPO, *KTO, *ASSEMBLY}
    assert covered == set(vectors())


def test_selective_logprobs(dtype: torch.dtype) -> None:
    e = entry("selective_logprobs", dtype)
    labels, x = e["labels"], e.expected
    response = (labels != -100).to(dtype)
    ids = labels.clamp(min=0)
    off = torch.where(labels == -100, 0.0, 1.0).bool()[:, 1:]
    logps = pf.token_logprobs(e["logits"], ids)
    e.check(torch.where(off, logps[:, 1:], 0.0), x["token_logps"])
    e.check(torch.where(off, pf.token_logprobs(e["logits"], ids, 0.7)[:, 1:], 0.0), x["token_logps_temp0_7"])
    e.check(pf.entropy(e["logits"])[:, 1:], x["entropy"])
    e.check(per_row(logps, response), x["sum_logps"])
    e.check(pf.masked_mean(logps, response, dim=1), x["mean_logps"])
    assert response.sum(1).tolist() == x["n_scored"]
    e.check(pf.weighted_sum(-logps, pf.token_mean(response)), x["nll_token_mean"])
    e.check(pf.weighted_sum(-logps, pf.sequence_mean(response)), x["nll_seq_mean"])


def test_reward_bradley_terry(dtype: torch.dtype) -> None:
    e = entry("reward_bradley_terry", dtype)
    c, r, x = e["chosen_rewards"].requires_grad_(), e["rejected_rewards"].requires_grad_(), e.expected
    center = e.params["center_rewards_coefficient"]
    loss = pf.bradley_terry_loss(c, r)
    e.check(loss, x["per_pair"])
    e.check(loss.mean(), x["loss"])
    e.check(pf.bradley_terry_loss(c, r, e["margin"]).mean(), x["loss_margin"])
    e.check(pf.bradley_terry_loss(c, r, None, center).mean(), x["loss_center"])
    e.check(pf.bradley_terry_loss(c, r, e["margin"], center).mean(), x["loss_margin_center"])
    grad_c, grad_r = torch.autograd.grad(loss.mean(), (c, r))
    e.check(grad_c, x["grad_loss_wrt_chosen"])
    e.check(grad_r, x["grad_loss_wrt_rejected"])
    assert (c > r).double().mean().item() == pytest.approx(x["accuracy_strict"])
    assert ((c > r) + 0.5 * (c == r)).mean().item() == pytest.approx(x["accuracy_ties_half"])
    e.check((c - r).mean(), x["mean_margin"])


SUM_KINDS = {
    "hinge": "hinge", "ipo_sum": "ipo", "reference_free": "reference_free", "nca_pair": "nca_pair",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "bco_pair_no_shift": "bco_pair", "sppo_hard": "sppo_hard",
    "sigmoid": "sigmoid",
}  # fmt: skip


@pytest.mark.parametrize("name", DPO)
def test_dpo_family(name: str, dtype: torch.dtype) -> None:
    e = entry(name, dtype)
    beta, eps, x = e.params["beta"], e.params["label_smoothing"], e.expected
    roles = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    sums = [per_row(e[f"{role}_token_logps"], e[f"{role.split('_')[1]}_mask"]) for role in roles]
    for role, value in zip(roles, sums, strict=True):
        e.check(value, x[f"{role}_logps"])
    sums = [value.requires_grad_() for value in sums]
    lengths = {f"{side}_lengths": e[f"{side}_mask"].sum(1) for side in ("chosen", "rejected")}

    losses = {key: pf.preference_loss(*sums, beta=beta, kind=kind) for key, kind in SUM_KINDS.items()}
    losses["cdpo"] = pf.preference_loss(*sums, beta=beta, label_smoothing=eps)
    losses["robust"] = pf.preference_loss(*sums, beta=beta, kind="robust", label_smoothing=eps)
    losses["ipo_avg"] = pf.preference_loss(*sums, beta=beta, kind="ipo", **lengths)
    losses["sigmoid_norm"] = pf.preference_loss(*sums, beta=beta, **lengths)
    assert set(losses) == set(x["per_pair"])
    for key, loss in losses.items():
        e.check(loss, x["per_pair"][key])
        e.check(loss.mean(), x["loss"][key])

    grads = torch.autograd.grad(losses["sigmoid"].mean(), sums[:2])
    e.check(grads[0], x["grad_sigmoid_wrt_policy_chosen_logps"])
    e.check(grads[1], x["grad_sigmoid_wrt_policy_rejected_logps"])
    a, b = sums[0] - sums[2], sums[1] - sums[3]
    e.check(a - b, x["logits_h"])
    e.check(beta * a, x["chosen_rewards"])
    e.check(beta * b, x["rejected_rewards"])
    e.check((beta * (a - b)).mean(), x["reward_margin_mean"])
    assert (a > b).double().mean().item() == x["reward_accuracy"]


def test_kl_estimators(dtype: torch.dtype) -> None:
    e = entry("kl_estimators", dtype)
    mask, x = masked(e), e.expected
    policy, ids = shifted(e["policy_logits"], e["actions"])
    reference, _ = shifted(e["ref_logits"], e["actions"])
    lp, ref = pf.token_logprobs(policy, ids)[:, 1:], pf.token_logprobs(reference, ids)[:, 1:]
    e.check(lp, x["logp"])
    e.check(ref, x["ref_logp"])
    for kind in ("k1", "k2", "k3"):
        estimate = pf.kl_estimate(lp, ref, kind)
        e.check(estimate, x[kind])
        e.check(pf.masked_mean(estimate, mask), x[f"{kind}_masked_token_mean"])
    k1 = per_row(lp - ref, mask)
    e.check(k1, x["k1_seq_sum"])
    e.check(k1.mean(), x["k1_seq_sum_mean"])
    full = pf.full_kl(policy, reference)[:, 1:]
    e.check(full, x["full_kl_pi_ref"])
    e.check(pf.full_kl(reference, policy)[:, 1:], x["full_kl_ref_pi"])
    e.check(pf.masked_mean(full, mask), x["full_kl_pi_ref_masked_mean"])
    e.check(per_row(full, mask).mean(), x["full_kl_pi_ref_seq_sum_mean"])
    log_p, log_q = e["policy_logits"].log_softmax(-1), e["ref_logits"].log_softmax(-1)
    for kind in ("k1", "k3"):
        mean = (log_p.exp() * pf.kl_estimate(log_p, log_q, kind)).sum(-1)
        e.check(mean, x[f"expectation_{kind}_under_pi"])


@pytest.mark.parametrize("name", GAE)
def test_gae(name: str, dtype: torch.dtype) -> None:
    e = entry(name, dtype)
    mask, x = e["mask"], e.expected
    advantages, returns = pf.gae(e["rewards"], e["values"], mask, e.params["gamma"], e.params["lam"])
    e.check(advantages, x["advantages"])
    e.check(returns, x["returns"])
    for key, unbiased in (("whitened_unbiased", True), ("whitened_biased", False)):
        whitened = pf.masked_whiten(advantages, mask, unbiased=unbiased, eps=e.params["whiten_eps"])
        e.check(whitened, per_cell(x[key], mask))


def per_cell(expected: list, mask: Tensor) -> list:
    """The expected numbers on the mask, 0 off it."""
    return torch.where(mask.bool(), torch.tensor(expected, dtype=torch.float64), 0.0).tolist()


def test_masked_whiten(dtype: torch.dtype) -> None:
    e = entry("masked_whiten", dtype)
    values, mask, x = e["values"], e["mask"], e.expected
    for key, unbiased in (("unbiased", True), ("biased", False)):
        e.check(pf.masked_whiten(values, mask, unbiased=unbiased), per_cell(x[key], mask))
        kept = pf.masked_whiten(values, mask, shift_mean=False, unbiased=unbiased)
        e.check(kept, per_cell(x[f"{key}_keep_mean"], mask))
        e.check(pf.masked_var(values, mask, unbiased), x[f"masked_var_{key}"])
    e.check(pf.masked_mean(values, mask), x["masked_mean"])


@pytest.mark.parametrize("name", PPO)
def test_ppo_losses(name: str, dtype: torch.dtype) -> None:
    e = entry(name, dtype)
    p, mask, x = e.params, masked(e), e.expected
    new, old, advantages = e["new_logps"].requires_grad_(), e["old_logps"], e["advantages"]
    by_token, by_sequence = pf.token_mean(mask), pf.sequence_mean(mask)
    terms = pf.ppo_policy_loss(new, old, advantages, p["clip_low"], p["clip_high"], mask=mask)
    loss = pf.weighted_sum(terms, by_token)
    e.check(loss, x["policy_loss"])
    e.check(torch.autograd.grad(loss, new)[0], x["grad_policy_loss_wrt_new_logps"])
    terms = terms.detach()
    e.check(pf.weighted_sum(terms, by_sequence), x["policy_loss_seq_mean"])
    e.check(pf.weighted_sum(terms, mask / len(mask)), x["policy_loss_seq_sum_mean"])
    dual = pf.ppo_policy_loss(
        new, old, advantages, p["clip_low"], p["clip_high"], delta=p["dual_clip"], mask=mask
    )
    e.check(pf.weighted_sum(dual, by_token), x["policy_loss_dual_clip3"])
    unclipped = pf.ppo_policy_loss(new, old, advantages, 1e9, 1e9, mask=mask)
    e.check(pf.masked_mean(terms > unclipped, mask), x["clipfrac"])
    e.check(pf.masked_mean((new - old).exp(), mask), x["ratio_mean"])
    for key, kind in (("k1_old_minus_new", "k1"), ("k2", "k2"), ("k3_old_new", "k3")):
        e.check(pf.masked_mean(pf.kl_estimate(old, new, kind), mask), x[f"approx_kl_{key}"])

    v, v_old, returns = e["new_values"], e["old_values"], e["returns"]
    clipped = pf.ppo_value_loss(v, v_old, returns, p["cliprange_value"], mask=mask)
    plain = pf.ppo_value_loss(v, v_old, returns, None, mask=mask)
    e.check(pf.weighted_sum(clipped, by_token), x["value_loss_clipped"])
    e.check(pf.weighted_sum(plain, by_token), x["value_loss_unclipped"])
    e.check(pf.masked_mean(clipped > plain, mask), x["value_clipfrac"])
    e.check(loss + p["vf_coef"] * pf.weighted_sum(clipped, by_token), x["total_loss_vf0_1"])


@pytest.mark.parametrize("name", ASSEMBLY)
def test_ppo_reward_assembly(name: str, dtype: torch.dtype) -> None:
    """They place the score one column later than we do, so only what comes before that is compared."""
    e = entry(name, dtype)
    p, ids, x = e.params, e["responses"], e.expected
    mask = pf.response_mask(ids, p["eos_token_id"])
    assert mask.long().tolist() == x["action_mask"]
    last = pf.last_response_index(mask)
    assert last.tolist() == x["last_token_index"]
    ended = ids[torch.arange(len(ids)), last] == p["eos_token_id"]
    assert ended.long().tolist() == x["contains_eos"]
    rule = {"replace": -1.0} if p["no_eos_rule"] == "score := -1" else {"penalty": 1.0}
    scores = pf.missing_eos_scores(e["scores"], ended, **rule)
    e.check(scores, x["scores_after_eos_rule"])
    kl = per_row(pf.kl_estimate(e["logprobs"], e["ref_logprobs"], "k1"), mask)
    e.check(kl, x["kl_seq_sum"])
    rewards = pf.shaped_rewards(scores, e["logprobs"], e["ref_logprobs"], mask, p["kl_coef"])
    e.check(rewards.sum(1).mean(), x["rlhf_reward_mean"])


def test_ppo_reward_at_last_token(dtype: torch.dtype) -> None:
    e = entry("ppo_reward_at_last_token", dtype)
    inputs = (e["scores"], e["logprobs"], e["ref_logprobs"], e["action_mask"])
    e.check(pf.shaped_rewards(*inputs, e.params["kl_coef"]), e.expected["token_rewards"])


def test_response_mask() -> None:
    e = entry("response_mask_pad_equals_eos")
    mask, ids = pf.response_mask(e["responses"], e.params["eos_token_id"]), e["responses"]
    assert mask.dtype == torch.bool
    assert mask.long().tolist() == e.expected["mask"]
    assert (pf.last_response_index(mask) + 1).tolist() == e.expected["lengths"]
    contains = ((ids == e.params["eos_token_id"]) & mask).any(1)
    assert contains.long().tolist() == e.expected["contains_eos"]


def test_adaptive_kl_controller() -> None:
    e = entry("adaptive_kl_controller")
    p = e.params
    controller = pf.AdaptiveKL(p["init_kl_coef"], p["target"], p["horizon"])
    coefs = [controller.observe(kl, p["n_steps"]) for kl in e.raw["inputs"]["observed_kl"]]
    assert coefs == pytest.approx(e.expected["kl_coef_after_update"], rel=1e-12)
    assert controller.coef == coefs[-1]


def test_group_advantages(dtype: torch.dtype) -> None:
    e = entry("group_advantages", dtype)
    scores, k, x = e["rewards"], e.params["num_generations"], e.expected
    for exponent in (4, 6):
        e.check(pf.group_advantages(scores, k, eps=10.0**-exponent), x[f"group_std_eps1e_{exponent}"])
    tiny = pf.group_advantages(scores, k, eps=1e-9)
    e.check(tiny, x["group_std_eps1e_9"])
    e.check(pf.group_advantages(scores, k, "none"), x["group_no_std"])
    e.check(pf.group_advantages(scores, k, "batch"), x["batch_std_eps1e_4"])
    assert (tiny.view(-1, k) == 0).all(1).double().mean().item() == x["zero_std_group_fraction"]
    e.check(pf.leave_one_out_advantages(scores, k), x["rloo"])
    penalised = pf.leave_one_out_advantages(scores - e.params["rloo_beta"] * e["seq_kl"], k)
    e.check(penalised, x["rloo_kl_in_reward"])
    normalised = (penalised - penalised.mean()) / (penalised.std() + 1e-4)
    e.check(normalised, x["rloo_kl_normalized"])


@pytest.mark.parametrize("name", GRPO)
def test_grpo_loss(name: str, dtype: torch.dtype) -> None:
    e = entry(name, dtype)
    p, mask, x = e.params, masked(e), e.expected
    new, old, advantages = e["new_logps"].requires_grad_(), e["old_logps"], e["advantages"]
    terms = pf.ppo_policy_loss(
        new, old, advantages, p["clip_low"], p["clip_high"],
        delta=p["delta"], level=p["importance_sampling_level"], mask=mask,
    )  # fmt: skip
    if p["beta"]:
        ratio = (new - old).exp() if p["use_bias_correction_kl"] else 1.0
        terms = terms + p["beta"] * ratio * pf.kl_estimate(new, e["ref_logps"], "k3")
    weights = {
        "grpo": pf.sequence_mean(mask),
        "bnpo": pf.token_mean(mask),
        "dapo": pf.token_mean(mask, p["num_items_in_batch"]),
        "dr_grpo": pf.constant_length(mask, p["max_completion_length"]),
    }
    for key, weight in weights.items():
        loss = pf.weighted_sum(terms, weight)
        e.check(loss, x[f"loss_{key}"])
        (grad,) = torch.autograd.grad(loss, new, retain_graph=True)
        e.check(grad, x[f"grad_{key}"])
    if "clip_low_frac" in x:
        ratio, a = (new - old).exp(), advantages.unsqueeze(1)
        low, high = (ratio < 1 - p["clip_low"]) & (a < 0), (ratio > 1 + p["clip_high"]) & (a > 0)
        e.check(pf.masked_mean(low, mask), x["clip_low_frac"])
        e.check(pf.masked_mean(high, mask), x["clip_high_frac"])


def test_rloo_sequence_loss(dtype: torch.dtype) -> None:
    e = entry("rloo_sequence_loss", dtype)
    p, mask = e.params, masked(e)
    terms = pf.ppo_policy_loss(
        e["new_logps"], e["old_logps"], e["advantages"], p["clip_low"], p["clip_high"],
        level="sequence_sum", mask=mask,
    )  # fmt: skip
    e.check(pf.weighted_sum(terms, pf.sequence_mean(mask)), e.expected["loss"])
    ones = torch.full_like(e["advantages"], -1.0)  # A = -1 and no clipping: the loss is the ratio
    ratio = pf.ppo_policy_loss(
        e["new_logps"], e["old_logps"], ones, 1.0, 1e9, level="sequence_sum", mask=mask
    )
    e.check(ratio[:, 0], e.expected["seq_ratio"])


def test_simpo(dtype: torch.dtype) -> None:
    e = entry("simpo_beta2.0_gamma1.0", dtype)
    beta, gamma, x = e.params["beta"], e.params["gamma"], e.expected
    c, r = e["avg_chosen_logps"], e["avg_rejected_logps"]
    loss = pf.simpo_loss(c, r, beta=beta, gamma=gamma)
    e.check(loss, x["per_pair"])
    e.check(loss.mean(), x["loss"])
    e.check(beta * c, x["chosen_rewards"])
    sums = (e["sum_chosen_logps"], e["sum_rejected_logps"])
    e.check(pf.simpo_loss(*sums, beta=beta, gamma=0.0), x["cpo_sigmoid_per_pair"])


def test_orpo(dtype: torch.dtype) -> None:
    e = entry("orpo", dtype)
    x, mask = e.expected, masked(e, "chosen_mask")
    term = pf.orpo_odds_term(e["avg_chosen_logps"], e["avg_rejected_logps"])
    e.check(-term, x["or_term"])
    e.check(term, (-F.logsigmoid(torch.tensor(x["log_odds_ratio"], dtype=torch.float64))).tolist())
    nll = pf.weighted_sum(-e["chosen_token_logps"], pf.token_mean(mask))
    e.check(nll, x["nll_chosen_token_mean"])
    e.check(nll + e.params["lambda_"] * term.mean(), x["loss"])


@pytest.mark.parametrize("name", KTO)
def test_kto(name: str, dtype: torch.dtype) -> None:
    e = entry(name, dtype)
    kl = pf.kto_kl(e["kl_policy_logps"], e["kl_ref_logps"])
    e.check(kl, e.expected["kl"])
    loss = pf.kto_loss(e["policy_logps"], e["ref_logps"], e["labels"], kl, **e.params)
    e.check(loss, e.expected["per_example"])
    e.check(loss.mean(), e.expected["loss"])
