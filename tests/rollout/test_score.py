"""Scores by token ids and by text, the missing-EOS rule, and the record that sampling leaves."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from preftune.data import Dialogue, Encoder, Preference, Sequences, Turn
from preftune.data.corpus import train_tokenizer
from preftune.models.roles import Critic, Policy, Reference, RewardModel
from preftune.models.scalar import PAD_TOKEN
from preftune.rollout.collect import collect
from preftune.rollout.rollout import Rollout
from preftune.rollout.sample import ended
from preftune.rollout.score import Scorer, same_vocabulary
from tiny import causal_lm, classifier

TEXTS = [("Hi", " Yo."), ("Why , I ask ?", " No"), ("So ?", " It 's ok !"), ("Go", "")]
BYTES = 257  # every byte and the end token
PROMPTS = [Dialogue((Turn("human", f" {text}"),)) for text, _ in TEXTS]


def tokenizer(merges: int = 0, **more: Any) -> PreTrainedTokenizerBase:
    pairs = [
        Preference(prompt=prompt, chosen=" Yo.", rejected=" No", source="", row=0) for prompt in PROMPTS
    ] * 3
    made = train_tokenizer(pairs, BYTES + merges)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def encoder(made: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(made, "transcript", 36, 12)


def batch_of(own: Encoder) -> Sequences:
    """Every other response unfinished."""
    items = [(prompt, reply) for prompt, (_, reply) in zip(PROMPTS, TEXTS, strict=True)]
    return own.sequences(items, ended=[True, False, True, True])


def scorer(own: Encoder, theirs: Encoder | None, vocabulary: int, batch_size: int = 3) -> Scorer:
    role = RewardModel(classifier(3, vocabulary), 0.3, 2.0)
    return Scorer(reward_model=role, encoder=own, translate=theirs, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_by_text_equals_by_tokens_where_the_vocabularies_agree(batch_size: int) -> None:
    own = encoder(tokenizer())
    batch = batch_of(own)
    by_tokens = scorer(own, None, BYTES + 1, batch_size).scores(batch)
    by_text = scorer(own, own, BYTES + 1, batch_size).scores(batch)
    torch.testing.assert_close(by_text, by_tokens, atol=1e-5, rtol=0)
    assert len(set(by_tokens.tolist())) == len(TEXTS)


def judged(made: Scorer, batch: Sequences) -> torch.Tensor:
    """What the reward model of a scorer says of rows that it reads as they are."""
    assert made.reward_model is not None
    return made.reward_model.normalised(made.reward_model.raw_scores(batch))


@torch.no_grad()
def test_another_tokenizer_scores_the_same_text() -> None:
    """Whatever the policy's own tokens are: here one whose decoder would tidy up spaces if it were let."""
    own = encoder(tokenizer(40, clean_up_tokenization_spaces=True))
    theirs = encoder(tokenizer())
    made = scorer(own, theirs, BYTES + 1)
    assert (
        own.sequences([(PROMPTS[1], " No")]).ids.shape[1]
        < theirs.sequences([(PROMPTS[1], " No")]).ids.shape[1]
    )
    got = made.scores(batch_of(own))
    torch.testing.assert_close(got, judged(made, batch_of(theirs)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", [40, 5])
@torch.no_grad()
def test_a_prompt_too_long_for_the_reward_model_loses_its_beginning(positions: int) -> None:
    """The policy's longer tokens hold more text than fits there; of 5 positions " No" and EOS take 4."""
    own, theirs = Encoder(tokenizer(40), "transcript", 38, 12), encoder(tokenizer())
    theirs.max_length = positions
    long = Dialogue((Turn("human", " Why , I ask ?" * 4),))
    prompt, _ = own.sequence(long, " No")
    assert len(theirs.text(own.tokenizer.decode(prompt))) > positions
    made = scorer(own, theirs, BYTES + 1)
    got = made.scores(own.sequences([(long, " No")]))
    ids = torch.tensor([(theirs.text(own.tokenizer.decode(prompt)) + theirs.response(" No"))[-positions:]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(got, judged(made, Sequences(ids, mask, mask)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_response_as_long_as_the_context_leaves_room_for_one_token_of_the_prompt() -> None:
    own, theirs = encoder(tokenizer(40)), encoder(tokenizer())
    theirs.max_length = 4
    batch = own.sequences([(PROMPTS[1], " No")])
    read = scorer(own, theirs, BYTES + 1)._for_judge(batch, ())
    expected = [*theirs.prompt(PROMPTS[1])[-1:], *theirs.response(" No")[:3]]
    assert read.ids.tolist() == [expected]


def test_a_pad_token_of_its_own_makes_no_other_vocabulary() -> None:
    with_pad = tokenizer()
    with_pad.add_special_tokens({"pad_token": PAD_TOKEN})
    assert same_vocabulary(encoder(tokenizer()), encoder(with_pad))
    assert same_vocabulary(encoder(with_pad), encoder(tokenizer()))
    assert not same_vocabulary(encoder(tokenizer()), encoder(tokenizer(40)))


def test_unfinished_responses_get_the_fixed_score() -> None:
    own = encoder(tokenizer())
    made, batch = scorer(own, None, BYTES + 1), batch_of(own)
    raw = made.scores(batch)
    assert torch.equal(made.shaped(batch, None).scores, raw)
    assert ended(batch, own.eos_id).tolist() == [True, False, True, True]
    expected = raw.clone()
    expected[1] = -1.5
    assert torch.equal(made.shaped(batch, -1.5).scores, expected)


@pytest.fixture
def collected() -> tuple[Rollout, dict[str, Any]]:
    own = Encoder(tokenizer(), "transcript", 30, 12)
    parts: dict[str, Any] = {
        "policy": Policy(causal_lm(1, BYTES)),
        "reference": Reference(causal_lm(2, BYTES)),
        "critic": Critic(classifier(4, BYTES + 1), 0.3, 2.0),
        "scorer": scorer(own, None, BYTES + 1),
    }
    rollout = collect(
        own.prompts(PROMPTS[:3], seeds=[1, 2, 3]),
        **parts,
        responses_per_prompt=2,
        max_new_tokens=9,
        temperature=0.7,
        missing_eos_score=-1.0,
        batch_size=4,
    )
    return rollout, parts


@torch.no_grad()
def test_a_rollout_holds_what_the_training_forward_says(collected: tuple[Rollout, dict[str, Any]]) -> None:
    """Old, reference and new log-probs at the sampling temperature; values; scores after the rule; groups."""
    rollout, parts = collected
    batch = rollout.sequences
    looked_up = {
        "logprobs": parts["policy"].logprobs(batch, 0.7),
        "reference_logprobs": parts["reference"].logprobs(batch, 0.7),
        "values": parts["critic"].values(batch),
    }
    for name, expected in looked_up.items():
        torch.testing.assert_close(getattr(rollout, name), expected, atol=1e-5, rtol=0)
        assert expected[batch.response].abs().min() > 0
    assert torch.equal(rollout.scores, parts["scorer"].shaped(batch, -1.0).scores)
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(rollout) == 6


def test_rows_of_a_rollout_stay_together(collected: tuple[Rollout, dict[str, Any]]) -> None:
    rollout, _ = collected
    order = torch.tensor([4, 1])
    part = rollout[order]
    width = int(rollout.sequences.attention[order].sum(1).max())
    assert torch.equal(part.sequences.ids, rollout.sequences.ids[order][:, :width])
    assert torch.equal(part.logprobs, rollout.logprobs[order][:, :width])
    assert torch.equal(part.scores, rollout.scores[order])
    assert torch.equal(part.group, rollout.group[order])


def test_a_reward_model_without_numbers_gives_infinite_scores_and_masks_nothing() -> None:
    """NaN would pass for a response that is left out; an infinite reward spoils the step: it is skipped."""
    own = encoder(tokenizer())
    broken = scorer(own, None, BYTES + 1)
    assert broken.reward_model is not None
    broken.reward_model.mean = float("nan")
    assert broken.scores(batch_of(own)).tolist() == [float("inf")] * len(TEXTS)
