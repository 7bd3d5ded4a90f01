"""The 25 bugs of the pipeline that preftune replaces: each that code can repeat has a test that would catch
it.

`CAUGHT_BY` is the table. Four are not there, since they are no bugs of code; docs/correctness.md says what
rules them out: 7 (a head whose scale nobody chose), 8 (an accuracy below one half called better than chance),
24 (evaluation code that is not in the repository) and 25 (no validation, saving or resuming).
"""

import ast
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.algorithms import GRPO, PPO
from preftune.config import EvaluationConfig
from preftune.data import Dialogue, Encoder, Preference, Turn, pad_sequences, split_pair
from preftune.data.corpus import train_tokenizer
from preftune.evaluation.compare import compare_to
from preftune.evaluation.mistakes import mistakes
from preftune.evaluation.policy import Conditions
from preftune.evaluation.reward_model import examine, score_pairs
from preftune.models.roles import Policy, Reference, RewardModel
from tiny import EOS, GROUP, Judge, causal_lm, classifier, gradients, pairs, prompts, roles, rollout, runner

TESTS = Path(__file__).resolve().parent
HERE = "test_seed_bugs.py"

CAUGHT_BY: dict[int, list[str]] = {
    # No prompt was ever found: the rows hold `chosen` and `rejected` only.
    1: [
        "data/test_hh.py::test_prompt_is_everything_up_to_the_last_assistant_marker",
        f"{HERE}::test_prompts",
    ],
    # An assistant marker was put in front of whole transcripts.
    2: ["data/test_hh.py::test_a_leading_assistant_marker_is_never_made_up", f"{HERE}::test_prompts"],
    # Sampling used one constant prompt, in another format than training.
    3: [
        "data/test_encode.py::test_each_prompt_is_sampled_as_it_was_trained_on",
        f"{HERE}::test_sampled_prompts",
    ],
    # The score was read at a pad position in training, at a real token afterwards.
    4: [
        "models/test_roles.py::test_scores_are_read_at_the_last_real_token_although_padding_is_eos",
        "models/test_roles.py::test_padding_order_and_split_change_nothing",
        "algorithms/test_offline.py::test_the_reward_loss_reads_the_last_real_token",
    ],
    # Truncation on the right cut the turn in which the pairs differ.
    5: ["data/test_encode.py::test_the_differing_last_turn_survives_a_prompt_that_is_too_long"],
    # A head that is missing or stale on disk stayed random, silently.
    6: [
        "models/test_loading.py::test_a_causal_lm_is_no_reward_model",
        "models/test_loading.py::test_a_saved_reward_model_scores_the_same_bit_for_bit",
        "runs/test_tiny_run.py::test_the_head_file_is_never_read",
    ],
    # Padding was attended to and supervised.
    9: [
        "algorithms/test_offline.py::test_sft_is_cross_entropy_with_ignored_labels",
        "data/test_encode.py::test_masks_come_from_lengths_although_padding_is_the_end_token",
    ],
    # Human turns were supervised too.
    10: [
        "algorithms/test_offline.py::test_sft_is_cross_entropy_with_ignored_labels",
        f"{HERE}::test_only_the_last_assistant_turn_is_supervised",
    ],
    # The saved tokenizer.json cut and padded.
    11: [
        "runs/test_tiny_run.py::test_saved_tokenizers_neither_cut_nor_pad",
        "data/test_encode.py::test_padding_and_truncation_baked_into_tokenizer_json_do_nothing",
    ],
    # Sampling never stopped at EOS and knew no temperature.
    12: [
        "rollout/test_sample.py::test_responses_stop_at_the_first_eos_and_contain_it",
        "rollout/test_sample.py::test_draws_follow_the_softmax_at_the_temperature",
    ],
    # The log-probability was a mean over prompt and response.
    13: [
        "models/test_roles.py::test_logprobs_equal_full_logits_row_by_row",
        "algorithms/test_policy_gradient.py::test_the_mean_of_ppo_gradients_is_the_policy_gradient",
    ],
    # The advantage was the raw score: no baseline, no GAE, no whitening.
    14: [
        f"{HERE}::test_a_constant_added_to_all_scores_changes_no_policy_gradient",
        "algorithms/test_ppo.py::test_two_steps_by_hand",
    ],
    # One update a rollout: the ratio was 1 always, and nothing could be clipped.
    15: [f"{HERE}::test_later_epochs_leave_ratio_1", "algorithms/test_ppo.py::test_two_steps_by_hand"],
    # k1 as a loss: no regularisation.
    16: [
        "algorithms/test_policy_gradient.py::test_a_bandit_is_solved_to_the_tilted_reference",
        "algorithms/test_ppo.py::test_the_reference_enters_through_the_reward",
    ],
    # "GRPO" without std, ratio, clipping or KL.
    17: ["algorithms/test_grpo.py::test_the_loss_by_hand"],
    # Responses were decoded and encoded again on the way to the reward model.
    18: [f"{HERE}::test_sampled_ids_reach_the_reward_model_untouched"],
    # DPO averaged over all tokens, prompt included.
    19: [
        "algorithms/test_offline.py::test_dpo_sums_log_ratios_over_the_response",
        f"{HERE}::test_dpo_ignores_what_the_prompt_costs",
    ],
    # Dropout was on in the policy and off in the reference.
    20: [
        "algorithms/test_offline.py::test_dpo_at_the_reference_is_exact_in_equal_batches",
        "models/test_roles.py::test_dropout_is_off",
    ],
    # EOS was never a target.
    21: [f"{HERE}::test_eos_is_a_target_of_every_algorithm"],
    # KL came out negative; no interval anywhere.
    22: [
        "evaluation/test_divergence.py::test_kl_of_a_policy_to_itself_is_exactly_zero",
        f"{HERE}::test_kl_is_summed_over_responses_and_never_negative",
        f"{HERE}::test_noise_is_not_called_a_difference",
    ],
    # Means of batch means, and ties counted as wrong without a word.
    23: [f"{HERE}::test_accuracy_is_over_pairs_and_ties_are_told"],
}
NO_CODE = {7, 8, 24, 25}
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


def test_every_bug_is_in_the_table() -> None:
    assert set(CAUGHT_BY) == set(range(1, 26)) - NO_CODE


@pytest.mark.parametrize("node", sorted({node for nodes in CAUGHT_BY.values() for node in nodes}))
def test_every_test_in_the_table_exists(node: str) -> None:
    file, name = node.split("::")
    assert name in functions(file)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(train_tokenizer([], 257), "transcript", 200, 60)


def test_prompts(encoder: Encoder) -> None:
    """1, 2: a row of two transcripts has a prompt, and nothing is put in front of it."""
    row = split_pair(TURNS + " Because.", TURNS + " No.")
    assert row.prompt.transcript() == TURNS
    prompt, chosen, rejected = encoder.pair(row)
    text = encoder.tokenizer.decode(prompt + chosen)
    assert text == TURNS + " Because." + encoder.tokenizer.eos_token
    assert rejected != chosen


def test_sampled_prompts(encoder: Encoder) -> None:
    """3: the sampler gets the ids that training conditions on, one prompt a row."""
    rows = [Dialogue((Turn("human", f" {word}"),)) for word in ("Hi", "Why?", "Tell me more")]
    sampled, trained = encoder.prompts(rows, [0, 1, 2]), encoder.sequences([(row, " Yes.") for row in rows])
    for i in range(3):
        left = sampled.ids[i][sampled.attention[i]].tolist()
        assert left == trained.ids[i][trained.attention[i] & ~trained.response[i]].tolist()
    assert len({tuple(row) for row in sampled.ids.tolist()}) == 3


def test_only_the_last_assistant_turn_is_supervised(encoder: Encoder) -> None:
    """10: whatever the roles said before is context."""
    row = split_pair(TURNS + " Because.", TURNS + " No.")
    batch = encoder.sequences([(row.prompt, row.chosen)])
    supervised = encoder.tokenizer.decode(batch.ids[0][batch.response[0]].tolist())
    assert supervised == " Because." + encoder.tokenizer.eos_token


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_constant_added_to_all_scores_changes_no_policy_gradient(algorithm: str) -> None:
    """14: with a score of +5 for everything the old code pushed every sample up. λ = 1: whitening takes it
    out.
    """
    batch = rollout(5)
    higher = replace(batch, scores=batch.scores + 5)
    config = {"lam": 1.0} if algorithm == "ppo" else {}
    plain, _ = gradients(algorithm, batch, **config)
    raised, _ = gradients(algorithm, higher, **config)
    for name, gradient in plain["policy"].items():
        torch.testing.assert_close(raised["policy"][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_later_epochs_leave_ratio_1(algorithm: str) -> None:
    """15: with more than one update a rollout the policy moves away from the one that sampled."""
    models = roles(algorithm)
    made, recorders = runner(algorithm, models, epochs=3)
    real = torch.optim.SGD(models["policy"].model.parameters(), lr=1.0)
    recorders["policy"].step = lambda closure=None: real.step()
    assert isinstance(made, PPO | GRPO)
    batch = rollout(5, policy=models["policy"], noise=0.0)
    metrics = made.improve(batch)
    assert abs(metrics["val/ratio" if algorithm == "ppo" else "ratio"] - 1) > 1e-4
    assert metrics["policy/clipfrac_avg" if algorithm == "ppo" else "clip_ratio/region_mean"] > 0


def test_sampled_ids_reach_the_reward_model_untouched() -> None:
    """18: the very ids, EOS included, although their text would be encoded differently."""
    models, seen, judge = roles("grpo"), [], RewardModel(classifier(3), 0.3, 2.0)
    made, _ = runner("grpo", models, max_new_tokens=10)

    def rule(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return judge.normalised(judge.raw_scores(batch))

    made.scorer = Judge(rule)
    record = made.rollout(prompts(3, 4))
    assert torch.equal(seen[0].ids, record.sequences.ids)
    assert torch.equal(seen[0].attention, record.sequences.attention)
    assert ((record.sequences.ids == EOS) & record.sequences.response).any()
    assert len(record) == 4 * GROUP


def test_dpo_ignores_what_the_prompt_costs() -> None:
    """19: a prompt whose likelihood changes alone moves neither loss nor rewards: only response columns
    count.
    """
    batch = pairs(5)
    _, metrics = gradients("dpo", batch)
    policy, reference = Policy(causal_lm(1)), Reference(causal_lm(2))
    with torch.no_grad():
        ratio = policy.logprobs(batch.chosen) - reference.logprobs(batch.chosen)
    prompt = batch.chosen.attention & ~batch.chosen.response
    assert (ratio[prompt] == 0).all()
    summed = 0.1 * ratio.sum(1).mean().item()
    assert metrics["rewards/chosen"] == pytest.approx(summed, abs=1e-5)
    averaged = 0.1 * (ratio.sum(1) / batch.chosen.attention.sum(1)).mean().item()
    assert abs(summed - averaged) > 1e-2  # the old number is another


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ppo", "grpo"])
def test_eos_is_a_target_of_every_algorithm(algorithm: str) -> None:
    """21: pad is EOS here, and the EOS that closes a response is still learnt from: its logit gets a
    gradient.
    """
    assert causal_lm(1).config.eos_token_id == EOS
    one = pad_sequences([[1, 2, 3], [4]], [[5, EOS], [6, 7, 8, EOS]], EOS)
    policy = Policy(causal_lm(1))
    with torch.no_grad():
        logprobs = policy.logprobs(one)
    last = one.attention.sum(1) - 1
    at_end = logprobs[torch.arange(2), last]
    assert (one.ids[torch.arange(2), last] == EOS).all()
    assert (at_end < 0).all()
    assert one.response[torch.arange(2), last].all()
    if algorithm == "sft":
        _, metrics = gradients("sft", one, models={"policy": policy})
        assert metrics["loss"] == pytest.approx(-logprobs.sum().item() / one.response.sum().item(), abs=1e-5)
    elif algorithm == "dpo":
        _, metrics = gradients("dpo", pairs(5))
        with torch.no_grad():
            chosen = policy.logprobs(pairs(5).chosen)
        assert metrics["logps/chosen"] == pytest.approx(chosen.sum(1).mean().item(), abs=1e-4)
    else:
        made, _ = runner(algorithm, roles(algorithm))
        batch = rollout(5)
        advantages = made.experience(batch).advantages
        closed = ((batch.sequences.ids == EOS) & batch.sequences.response).any(1)
        assert closed.any()
        if advantages.dim() == 2:
            ends = batch.sequences.attention.sum(1) - 1
            assert (advantages[torch.arange(len(batch)), ends][closed] != 0).all()


def _bench(policy: Policy, reference: Reference, encoder: Encoder) -> list[dict[str, Any]]:
    questions = [Dialogue((Turn("human", f" {word}"),)) for word in ("Hi", "So", "Go")]
    conditions = Conditions(
        prompts=[Preference(prompt=q, chosen=" a", rejected=" b", row=i) for i, q in enumerate(questions)],
        encoder=encoder,
        scorer=None,
        reference=reference,
        settings=EvaluationConfig(max_new_tokens=8, batch_size=2),
        seed=0,
        device=torch.device("cpu"),
    )
    return conditions.rows(policy, lambda n: None, responses=2)


def test_kl_is_summed_over_responses_and_never_negative(encoder: Encoder) -> None:
    """22: exact over the vocabulary, so 0 for equal policies and positive for others."""
    policy, other = Policy(causal_lm(1, 257)), Policy(causal_lm(2, 257))
    same = _bench(policy, Reference(causal_lm(1, 257)), encoder)
    assert all(row["kl"] == 0 and row["k1"] == 0 for row in same)
    apart = _bench(other, Reference(causal_lm(1, 257)), encoder)
    assert len(apart) == 6
    assert len({row["prompt"] for row in apart}) == 3
    assert all(row["kl"] > 0.1 * row["length"] for row in apart)


def test_noise_is_not_called_a_difference() -> None:
    """22: 100 paired scores that differ by less than they scatter: 0 is in the interval."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(100, generator=random)
    spread = torch.randn(100, generator=random)
    noise = base + 0.1 + spread - spread.mean()  # one standard error away
    better = base + 1 + 0.5 * torch.randn(100, generator=random)
    rows = {
        "policy_sft": [{"score": s} for s in base.tolist()],
        "policy_ppo": [{"score": s} for s in noise.tolist()],
        "policy_dpo": [{"score": s} for s in better.tolist()],
    }
    records = {r["policy"]: r for r in compare_to("policy_sft", rows, EvaluationConfig(), 0)}
    assert records["policy_ppo"]["verdict"] == "no detectable difference"
    assert records["policy_ppo"]["interval"][0] < 0 < records["policy_ppo"]["interval"][1]
    assert records["policy_dpo"]["verdict"] == "better"
    assert records["policy_dpo"]["interval"][0] > 0


def test_accuracy_is_over_pairs_and_ties_are_told(encoder: Encoder) -> None:
    """23: seven pairs in batches of three; a model that scores everything alike ties everywhere."""
    texts = [
        (" yes", " no"),
        (" a", " b"),
        (" c c", " d"),
        (" e", " f f"),
        (" g", " h"),
        (" i", " j"),
        (" k", " l"),
    ]
    question = Dialogue((Turn("human", " Hi"),))
    rows = [Preference(prompt=question, chosen=a, rejected=b, row=i) for i, (a, b) in enumerate(texts)]
    model = RewardModel(classifier(3, 258))
    results = [
        score_pairs(model, encoder, rows, size, torch.device("cpu"), lambda n: None) for size in (3, 7)
    ]
    right = [s["chosen"] > s["rejected"] for s in results[0]]
    assert 0 < sum(right) < 7
    for scored in results:
        assert examine("rm", scored, 0)["accuracy"]["value"] == pytest.approx(sum(right) / 7)
        assert [row["idx"] for row in mistakes(scored)] == sorted(
            (i for i in range(7) if not right[i]), key=lambda i: scored[i]["chosen"] - scored[i]["rejected"]
        )
    model.model.score.weight.data.zero_()
    tied = score_pairs(model, encoder, rows, 3, torch.device("cpu"), lambda n: None)
    record = examine("rm", tied, 0)
    assert (record["ties"], record["accuracy"]["value"], record["accuracy_ties_half"]) == (7, 0.0, 0.5)
    assert len(mistakes(tied)) == 7
    assert all("tie" in row["tags"] for row in mistakes(tied))
