"""The bugs of the pipeline that preftune replaced, as edits that put them back into today's source.

`make planted` (tests/planted_run.py) plants each of them alone in a copy of the source and expects every test
named beside it to fail. The numbers are those of `CAUGHT_BY` in test_seed_bugs.py and of docs/correctness.md.
"""

from dataclasses import dataclass

SEED = "tests/test_seed_bugs.py"
ROLES = "tests/models/test_roles.py"
ENCODE = "tests/data/test_encode.py"
SAMPLE = "tests/rollout/test_sample.py"
OFFLINE = "tests/algorithms/test_offline.py"
INVARIANTS = "tests/algorithms/test_invariants.py"
GRPO = "tests/algorithms/test_grpo.py"
PPO = "tests/algorithms/test_ppo.py"


@dataclass(frozen=True)
class Bug:
    """`source` occurs once in `file` (a path below src/preftune) and becomes `broken`; `red` must fail."""

    number: int
    what: str
    file: str
    source: str
    broken: str
    red: tuple[str, ...]


PLANTED = (
    Bug(
        1,
        "no prompt is found",
        "data/hh.py",
        "return Preference(prompt=prompt, chosen=good, rejected=bad)",
        "return Preference(prompt=Dialogue(), chosen=good, rejected=bad)",
        (
            "tests/data/test_hh.py::test_prompt_is_everything_up_to_the_last_assistant_marker",
            f"{SEED}::test_prompts",
        ),
    ),
    Bug(
        2,
        "an assistant marker in front of whole transcripts",
        "data/dialogue.py",
        """return "".join(""",
        """return "\\n\\nAssistant:" + "".join(""",
        (
            "tests/data/test_hh.py::test_a_leading_assistant_marker_is_never_made_up",
            f"{SEED}::test_prompts",
        ),
    ),
    Bug(
        3,
        "one constant prompt for all sampling",
        "data/encode.py",
        "pad_prompts([self.prompt(prompt) for prompt in prompts], seeds, self.pad_id)",
        'pad_prompts([self._plain("Human: Hello\\nAssistant:") for _ in prompts], seeds, self.pad_id)',
        (f"{ENCODE}::test_each_prompt_is_sampled_as_it_was_trained_on", f"{SEED}::test_sampled_prompts"),
    ),
    Bug(
        4,
        "scores are read in the last column, padding or not",
        "models/roles.py",
        "last = sequences.attention.sum(1, keepdim=True) - 1\n",
        "last = torch.full_like(sequences.attention[:, :1], sequences.ids.shape[1] - 1, dtype=torch.long)\n",
        (
            f"{ROLES}::test_scores_are_read_at_the_last_real_token_although_padding_is_eos",
            f"{ROLES}::test_padding_order_and_split_change_nothing",
            f"{OFFLINE}::test_the_reward_loss_reads_the_last_real_token",
        ),
    ),
    Bug(
        5,
        "prompts that are too long are cut on the right",
        "data/encode.py",
        "            if len(ids) <= limit:\n                return ids, prompt\n",
        "            return ids[:limit], prompt\n",
        (
            f"{ENCODE}::test_old_turns_go_first_and_a_human_turn_comes_first",
            f"{ENCODE}::test_a_last_human_turn_that_is_too_long_keeps_its_end",
        ),
    ),
    Bug(
        5,
        "the whole text is cut on the right, and what is left of such a pair is equal",
        "data/encode.py",
        "        prompt_ids, turns = self._fit(preference.prompt, self.max_prompt_length)\n",
        """        whole = [self.text(preference.prompt.transcript() + reply) for reply in (" a", " b")]
        if whole[0][: self.max_prompt_length] == whole[1][: self.max_prompt_length]:
            raise RejectedRow("response_too_long_became_equal")
        prompt_ids, turns = self._fit(preference.prompt, self.max_prompt_length)
""",
        (f"{ENCODE}::test_the_differing_last_turn_survives_a_prompt_that_is_too_long",),
    ),
    Bug(
        6,
        "a reward head that is not in the file stays random",
        "models/scalar.py",
        "    if wrong:\n",
        "    if False:\n",
        ("tests/models/test_loading.py::test_a_reward_model_without_its_head_is_refused",),
    ),
    Bug(
        7,
        "a new head at a scale of its own",
        "models/scalar.py",
        "head.weight.copy_(scale * noise / math.sqrt(head.in_features + 1) + 0.0)",
        "head.weight.copy_(noise)",
        ("tests/models/test_loading.py::test_a_new_head_follows_its_seed_and_its_scale",),
    ),
    Bug(
        9,
        "padding is attended to and supervised",
        "data/batch.py",
        "attention = column < lengths\n",
        "attention = torch.ones_like(ids, dtype=torch.bool)\n",
        (f"{ENCODE}::test_masks_come_from_lengths_although_padding_is_the_end_token",),
    ),
    Bug(
        9,
        "the loss is a mean over padding too",
        "algorithms/sft.py",
        "token_mean(batch.response, tokens)",
        "token_mean(batch.response | True)",
        (
            f"{OFFLINE}::test_sft_is_cross_entropy_with_ignored_labels",
            "tests/training/test_end_to_end_golden.py::test_sft",
        ),
    ),
    Bug(
        10,
        "what people said is supervised too",
        "data/batch.py",
        "attention & (column >= starts)",
        "attention & (column >= 1)",
        (
            f"{SEED}::test_only_the_last_assistant_turn_is_supervised",
            f"{ENCODE}::test_masks_come_from_lengths_although_padding_is_the_end_token",
        ),
    ),
    Bug(
        11,
        "what tokenizer.json says about padding and cutting is done",
        "data/encode.py",
        """        begin = tokenizer("a").input_ids[:1]\n""",
        """        backend: Any = tokenizer.backend_tokenizer
        if backend.truncation is not None:
            read = type(backend).from_str(backend.to_str())
            self._encode = lambda text, *, special: read.encode(text, add_special_tokens=False).ids
        begin = tokenizer("a").input_ids[:1]
""",
        (f"{ENCODE}::test_padding_and_truncation_baked_into_tokenizer_json_do_nothing",),
    ),
    Bug(
        12,
        "sampling does not stop at EOS",
        "rollout/sample.py",
        "ending = is_end(token, ends) & ~done\n",
        "ending = torch.zeros_like(done)\n",
        (f"{SAMPLE}::test_responses_stop_at_the_first_eos_and_contain_it",),
    ),
    Bug(
        12,
        "sampling knows no temperature",
        "rollout/sample.py",
        "_draw(logits, uniforms[computed, t], temperature)",
        "_draw(logits, uniforms[computed, t], 1.0)",
        (f"{SAMPLE}::test_draws_follow_the_softmax_at_the_temperature",),
    ),
    Bug(
        13,
        "log-probabilities are means over prompt and response",
        "models/roles.py",
        """            return self.module(sequences.ids, sequences.attention, sequences.response, temperature)


class Policy(CausalLM):""",
        """            own = sequences.attention.clone()
            own[:, 0] = False
            logprobs, entropy = self.module(sequences.ids, sequences.attention, own, temperature)
        mean = logprobs.sum(1, keepdim=True) / own.sum(1, keepdim=True)
        return mean * sequences.response, entropy * sequences.response


class Policy(CausalLM):""",
        (
            f"{ROLES}::test_logprobs_equal_full_logits_row_by_row",
            "tests/algorithms/test_policy_gradient.py::test_the_mean_of_ppo_gradients_is_the_policy_gradient",
        ),
    ),
    Bug(
        14,
        "PPO's advantage is the raw score",
        "algorithms/ppo.py",
        "advantages=corrected(torch.zeros_like(advantages).masked_scatter(response, white), rollout),",
        "advantages=rollout.scores.unsqueeze(1) * response,",
        (
            f"{SEED}::test_a_constant_added_to_all_scores_changes_no_policy_gradient",
            f"{PPO}::test_two_steps_by_hand",
            f"{PPO}::test_advantages_are_whitened_over_the_response_tokens_of_the_rollout",
        ),
    ),
    Bug(
        15,
        "PPO and GRPO take one update a rollout",
        "algorithms/on_policy.py",
        "for epoch in range(config.epochs)",
        "for epoch in range(1)",
        (f"{SEED}::test_later_epochs_leave_ratio_1",),
    ),
    Bug(
        16,
        "the reference is not in PPO's reward",
        "functional/advantages.py",
        """penalty = zero_off(-kl_coef * kl_estimate(logprobs, reference_logprobs, "k1"), active)""",
        "penalty = torch.zeros_like(logprobs)",
        (
            f"{PPO}::test_the_reference_enters_through_the_reward",
            "tests/functional/test_advantages.py::test_shaped_rewards_by_hand",
        ),
    ),
    Bug(
        16,
        "k1 as a loss, whose expected gradient is 0",
        "algorithms/grpo.py",
        """batch.reference_logprobs, "k2" if config.kl == "k2" else "k3")""",
        """batch.reference_logprobs, "k1")""",
        (
            f"{GRPO}::test_the_loss_by_hand",
            "tests/algorithms/test_policy_gradient.py::test_k3_as_a_loss_has_the_gradient_of_the_forward_kl",
        ),
    ),
    Bug(
        17,
        "GRPO without a division by the group's std",
        "algorithms/grpo.py",
        "self.config.scale",
        '"none"',
        (f"{GRPO}::test_the_loss_by_hand",),
    ),
    Bug(
        17,
        "GRPO without ratio and clipping",
        "algorithms/grpo.py",
        """        terms = ppo_policy_loss(
            logprobs, batch.logprobs, batch.advantages, config.clip_low, config.clip_high, mask=response
        )
""",
        "        terms = -batch.advantages.unsqueeze(1) * logprobs\n",
        (f"{GRPO}::test_the_loss_by_hand", "tests/training/test_end_to_end_golden.py::test_grpo"),
    ),
    Bug(
        17,
        "GRPO without KL",
        "algorithms/grpo.py",
        "terms + config.kl_coef * kl,",
        "terms,",
        (f"{GRPO}::test_the_loss_by_hand", "tests/training/test_end_to_end_golden.py::test_grpo"),
    ),
    Bug(
        18,
        "the reward model reads a text without EOS",
        "rollout/score.py",
        "judge.response(response, closed), ",
        "judge.response(response, False), ",
        ("tests/rollout/test_score.py::test_by_text_equals_by_tokens_where_the_vocabularies_agree",),
    ),
    Bug(
        19,
        "DPO takes means over prompt and response",
        "algorithms/dpo.py",
        "concatenate(pairs.chosen, pairs.rejected)).sum(1).chunk(2)",
        "concatenate(pairs.chosen, pairs.rejected)).mean(1).chunk(2)",
        (
            f"{OFFLINE}::test_dpo_sums_log_ratios_over_the_response",
            f"{SEED}::test_dpo_ignores_what_the_prompt_costs",
            "tests/training/test_end_to_end_golden.py::test_dpo",
        ),
    ),
    Bug(
        20,
        "dropout is on in every role",
        "models/roles.py",
        "return fuse_activations(model.eval())",
        "return fuse_activations(model.train())",
        (f"{ROLES}::test_dropout_is_off",),
    ),
    Bug(
        20,
        "dropout is on in what the learner trains",
        "training/learner.py",
        "        role.module.eval()\n",
        "        role.module.train()\n",
        (f"{OFFLINE}::test_dpo_at_the_reference_is_exact_in_equal_batches",),
    ),
    Bug(
        21,
        "complete responses get no EOS",
        "data/encode.py",
        'closing="", complete=True), [self.eos_id]\n',
        'closing="", complete=True), []\n',
        (
            f"{ENCODE}::test_a_row_is_the_transcript_and_one_end_token",
            f"{ENCODE}::test_responses_without_an_end",
        ),
    ),
    Bug(
        21,
        "the mask is `ids != pad`, and pad is EOS",
        "data/batch.py",
        "attention = column < lengths\n",
        "attention = ids != pad_id\n",
        (
            f"{SEED}::test_eos_is_a_target_of_every_algorithm",
            f"{ENCODE}::test_masks_come_from_lengths_although_padding_is_the_end_token",
        ),
    ),
    Bug(
        22,
        "the KL is a mean of log-ratios, of either sign",
        "evaluation/divergence.py",
        "exact.index_add_(0, rows[chunk], kl)",
        "exact.index_add_(0, rows[chunk], log_ratio / 9)",
        (
            f"{SEED}::test_kl_is_summed_over_responses_and_never_negative",
            "tests/evaluation/test_divergence.py::test_exact_kl_equals_the_sum_over_the_vocabulary",
        ),
    ),
    Bug(
        22,
        "a difference of means is called a difference, whatever its interval",
        "records/verdict.py",
        "    if low is None or high is None or not enough or not survives:\n        return UNCLEAR\n"
        "    return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR",
        "    return BETTER if (low or 0) + (high or 0) > 0 else WORSE",
        (f"{SEED}::test_noise_is_not_called_a_difference",),
    ),
    Bug(
        23,
        "a mean of the means of uneven parts",
        "training/learner.py",
        "weighted_sum(out.terms, share)",
        "weighted_sum(out.terms, share / share.sum() / len(slices))",
        (
            f"{INVARIANTS}::test_the_microbatch_size_changes_no_gradient",
            f"{OFFLINE}::test_sft_is_cross_entropy_with_ignored_labels",
        ),
    ),
    Bug(
        23,
        "ties count without a word",
        "evaluation/reward_model.py",
        "    return stats.share_by_group(margins > 0, prompts)\n",
        "    return stats.share_by_group(margins >= 0, prompts)\n",
        (f"{SEED}::test_accuracy_is_over_pairs_and_ties_are_told",),
    ),
)
