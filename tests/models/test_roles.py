"""Roles: log-probs, scores and values at the right columns, whatever stands beside them."""

import pytest
import torch
from torch import Tensor

from preftune.data import Sequences, pad_sequences
from preftune.models.fast.support import plain_layout
from preftune.models.roles import (
    Combine,
    Critic,
    Ensemble,
    ImplicitReward,
    Policy,
    Reference,
    RewardModel,
    casting,
)
from preftune.models.scalar import Pooling
from preftune.rollout.collect import by_batches
from tiny import EOS, causal_lm, classifier, sequences, widened


def plain_logprobs(model: torch.nn.Module, row: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of every token after each prefix of one unpadded row: (len(row), V), float64."""
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0].double() / temperature
    return logits - logits.exp().sum(-1, keepdim=True).log()


def unpadded(batch: Sequences) -> list[tuple[list[int], int]]:
    """Each row's real ids and the column where its response starts."""
    return [
        (ids[real].tolist(), int(written.int().argmax()))
        for ids, real, written in zip(batch.ids, batch.attention, batch.response, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@torch.no_grad()
def test_logprobs_equal_full_logits_row_by_row(temperature: float) -> None:
    policy, batch = Policy(causal_lm(1)), sequences(0)
    got = policy.logprobs(batch, temperature)
    for i, (row, start) in enumerate(unpadded(batch)):
        table = plain_logprobs(policy.model, row, temperature)
        expected = torch.stack([table[t - 1, row[t]] for t in range(start, len(row))])
        torch.testing.assert_close(got[i, start : len(row)].double(), expected, atol=1e-5, rtol=0)
    assert got.dtype == torch.float32
    assert (got[~batch.response] == 0).all()
    assert (got[batch.response] < 0).all()


@torch.no_grad()
def test_entropy_is_that_of_the_predicting_distribution() -> None:
    policy, batch = Policy(causal_lm(1)), sequences(0)
    _, entropy = policy.logprobs_and_entropy(batch, 0.7)
    for i, (row, start) in enumerate(unpadded(batch)):
        p = torch.softmax(policy.model(torch.tensor([row])).logits[0].double() / 0.7, -1)
        expected = torch.distributions.Categorical(p).entropy()[start - 1 : -1]
        torch.testing.assert_close(entropy[i, start : len(row)].double(), expected, atol=1e-5, rtol=0)
    assert (entropy[~batch.response] == 0).all()


LOOKUPS = {
    "policy": lambda: Policy(causal_lm(1)).logprobs,
    "reference": lambda: Reference(causal_lm(1)).logprobs,
    "reward model": lambda: RewardModel(classifier(3), 0.3, 2.0).raw_scores,
    "implicit reward": lambda: ImplicitReward(causal_lm(1), causal_lm(2), 0.5, 0.3, 2.0).raw_scores,
    "critic": lambda: Critic(classifier(3), 0.3, 2.0).values,
}


@pytest.mark.parametrize("name", LOOKUPS)
@torch.no_grad()
def test_padding_order_and_split_change_nothing(name: str) -> None:
    look, batch = LOOKUPS[name](), sequences(3, 7)
    plain = look(batch)
    wide = look(widened(batch, 5))
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    permuted = look(batch[order])
    if plain.dim() == 2:
        assert (wide[:, plain.shape[1] :] == 0).all()
        wide = wide[:, : plain.shape[1]]
        torch.testing.assert_close(by_batches(look, batch, 3), plain, atol=1e-5, rtol=0)
    else:
        split = torch.cat([look(batch[:3]), look(batch[3:])])
        torch.testing.assert_close(split, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(wide, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(permuted, plain[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["policy", "critic", "reward model"])
def test_gradients_are_exactly_zero_where_nothing_is_predicted(name: str) -> None:
    """Final hidden states off the predicting columns, and the embedded inputs on padding."""
    batch, kept = widened(sequences(4), 3), []
    look = LOOKUPS[name]()
    model = look.__self__.model

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        # A tensor of its own, so that its gradient is that of this place alone.
        output = output * 1.0
        output.retain_grad()
        kept.append(output)
        return output

    model.base_model.wte.register_forward_hook(keep)
    model.base_model.ln_f.register_forward_hook(keep)
    with plain_layout():  # columns of a tree are not those of the batch
        look(batch).square().sum().backward()
    embedded, hidden = (tensor.grad.abs().sum(-1) for tensor in kept)
    if name == "reward model":
        last = batch.attention.sum(1, keepdim=True) - 1
        read = torch.arange(batch.ids.shape[1]) == last
    else:
        read = torch.nn.functional.pad(batch.response[:, 1:], (0, 1))
    assert (hidden[~read] == 0).all()
    assert (hidden[read] > 0).all()
    assert (embedded[~batch.attention] == 0).all()
    if name != "reward model":  # the last response token is predicted, and predicts nothing
        last = batch.attention.sum(1) - 1
        assert (embedded[torch.arange(len(last)), last] == 0).all()
        assert (embedded[:, 0] > 0).all()


def test_dropout_is_off() -> None:
    batch = sequences(0)
    for look in (make() for make in LOOKUPS.values()):
        assert torch.equal(look(batch), look(batch))


def test_a_reference_has_no_gradient() -> None:
    reference = Reference(causal_lm(1))
    assert not reference.logprobs(sequences(0)).requires_grad
    assert not any(p.requires_grad for p in reference.model.parameters())


@torch.no_grad()
def test_scores_are_read_at_the_last_real_token_although_padding_is_eos() -> None:
    """Rows with and without EOS at the end, EOS inside, and a last token equal to the padding on either side
    of it.
    """
    role = RewardModel(classifier(3))
    prompts = [[1, 2], [EOS, 4], [5], [1, 2]]
    batch = pad_sequences(prompts, [[3, EOS], [6, 7, EOS, EOS, 8], [EOS], [3]], EOS)
    got = role.raw_scores(batch)
    for i, (row, _) in enumerate(unpadded(batch)):
        hidden = role.model.base_model(torch.tensor([row])).last_hidden_state[0, -1]
        assert got[i].item() == pytest.approx(float(role.model.score.weight[0] @ hidden), abs=1e-5)
    assert abs(got[0] - got[3]) > 1e-3  # with and without EOS differ


@torch.no_grad()
def test_scores_are_normalised_by_mean_and_std() -> None:
    role, raw = RewardModel(classifier(3), 0.5, 4.0), torch.tensor([0.5, 4.5, -3.5])
    assert role.normalised(raw).tolist() == [0.0, 1.0, -1.0]


@torch.no_grad()
def test_a_row_of_one_token_has_a_score() -> None:
    """Alone and beside longer rows: column 0 is a last column too."""
    role = RewardModel(classifier(3))
    alone = role.raw_scores(pad_sequences([[7]], [[]], EOS))
    beside = role.raw_scores(pad_sequences([[7], [1, 2]], [[], [3]], EOS))
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mean_score_is_that_of_all_tokens_of_the_response() -> None:
    """Row by row: of the whole response, and after each of its tokens of those up to there; no other token
    counts, and padding is EOS.
    """
    role = RewardModel(classifier(3), 0.5, 4.0, "mean")
    prompts = [[1, 2], [EOS, 4], [5], [1, 2]]
    batch = pad_sequences(prompts, [[3, EOS], [6, 7, EOS, EOS, 8], [EOS], [3]], EOS)
    got, after = role.raw_scores(batch), role.per_position(batch, batch.response)
    for i, (row, start) in enumerate(unpadded(batch)):
        hidden = role.model.base_model(torch.tensor([row])).last_hidden_state[0, start:]
        expected = (hidden @ role.model.score.weight[0]).cumsum(0) / torch.arange(1, len(row) - start + 1)
        torch.testing.assert_close(after[i][start : len(row)], expected, atol=1e-5, rtol=0)
        assert got[i].item() == pytest.approx(float(expected[-1]), abs=1e-5)
        assert (after[i][~batch.response[i]] == 0).all()
    assert abs(got[0] - RewardModel(role.model).raw_scores(batch)[0]) > 1e-3


@torch.no_grad()
def test_a_mean_score_without_a_response_is_that_of_the_last_token() -> None:
    """A prompt alone has one; a gradient comes through all tokens that are read."""
    last, mean = RewardModel(classifier(3)), RewardModel(classifier(3), pooling="mean")
    bare = pad_sequences([[7, 8], [1, 2]], [[], [3]], EOS)
    torch.testing.assert_close(mean.raw_scores(bare), last.raw_scores(bare), atol=1e-5, rtol=0)
    assert mean.raw_scores(sequences(0)[:0]).shape == (0,)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.no_grad()
def test_the_head_of_a_response_state_is_the_score(pooling: Pooling) -> None:
    role, batch = RewardModel(classifier(3), pooling=pooling), sequences(6)
    states = role.response_states(batch)
    assert states.shape == (len(batch), 16)
    scores = states @ role.model.score.weight[0]
    torch.testing.assert_close(scores, role.raw_scores(batch), atol=1e-5, rtol=0)
    assert role.response_states(batch[:0]).shape == (0, 16)


@torch.no_grad()
def test_the_implicit_reward_is_beta_times_the_log_ratio_of_the_response() -> None:
    """r = β (log π - log π_ref), and after every token what the response is worth up to there."""
    role, batch = ImplicitReward(causal_lm(1), causal_lm(2), 0.5, 0.25, 2.0), sequences(5)
    ratio = Policy(causal_lm(1)).logprobs(batch) - Reference(causal_lm(2)).logprobs(batch)
    torch.testing.assert_close(role.raw_scores(batch), 0.5 * ratio.sum(1))
    torch.testing.assert_close(role.normalised(role.raw_scores(batch)), (0.5 * ratio.sum(1) - 0.25) / 2)
    after = role.module(batch.ids, batch.attention, batch.response)
    for row, seen in enumerate(batch.response):
        torch.testing.assert_close(after[row][seen], 0.5 * ratio[row][seen].cumsum(0))
        assert (after[row][~seen] == 0).all()


@torch.no_grad()
def test_an_implicit_reward_of_averages_is_divided_by_the_length() -> None:
    """As the loss of DPO with length_average, whose reward it is; after every token of those up to there."""
    role, batch = ImplicitReward(causal_lm(1), causal_lm(2), 0.5, averaged=True), sequences(5)
    ratio = Policy(causal_lm(1)).logprobs(batch) - Reference(causal_lm(2)).logprobs(batch)
    torch.testing.assert_close(role.raw_scores(batch), 0.5 * ratio.sum(1) / batch.response.sum(1))
    after = role.module(batch.ids, batch.attention, batch.response)
    for row, seen in enumerate(batch.response):
        numbers = torch.arange(1, int(seen.sum()) + 1)
        torch.testing.assert_close(after[row][seen], 0.5 * ratio[row][seen].cumsum(0) / numbers)


def test_an_implicit_reward_has_no_gradient() -> None:
    role = ImplicitReward(causal_lm(1), causal_lm(2), 0.5)
    assert (role.mean, role.std, role.dtype) == (0.0, 1.0, torch.float32)
    assert not role.raw_scores(sequences(5)).requires_grad
    assert role.model is role.module.policy.model


@pytest.mark.parametrize("kind", [RewardModel, Critic])
def test_scores_are_raw_float32_unless_told_otherwise(kind: type[RewardModel | Critic]) -> None:
    role = kind(classifier(3))
    assert (role.mean, role.std, role.dtype) == (0.0, 1.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_roles_own_precision_is_cast_to(dtype: torch.dtype) -> None:
    role = Policy(causal_lm(1))
    with casting(role):
        assert not torch.is_autocast_enabled("cpu")
    role.dtype = dtype
    with casting(role):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype


@torch.no_grad()
def test_values_read_the_state_before_the_token() -> None:
    """values[:, t] is the head at hidden state t - 1: it cannot see token t or anything after it."""
    critic, batch = Critic(classifier(3), 0.5, 4.0), sequences(8)
    got = critic.values(batch)
    for i, (row, start) in enumerate(unpadded(batch)):
        for t in range(start, len(row)):
            hidden = critic.model.base_model(torch.tensor([row[:t]])).last_hidden_state[0, -1]
            expected = (float(critic.model.score.weight[0] @ hidden) - 0.5) / 4
            assert got[i, t].item() == pytest.approx(expected, abs=1e-5)
    assert (got[~batch.response] == 0).all()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("combine", ["mean", "min", "mean-sd"])
@torch.no_grad()
def test_an_ensemble_combines_normalised_scores(combine: Combine, pooling: Pooling) -> None:
    """By hand, row by row, from each member's own score of the last real token, or of the response."""
    models, units, batch = (
        [classifier(seed) for seed in (1, 2, 3)],
        [(0.1, 2.0), (-0.2, 0.5), (0.0, 1.0)],
        sequences(4),
    )
    ensemble = Ensemble(models, units, combine, 0.7, mean=0.3, std=4.0, pooling=pooling)
    raw, members = ensemble.raw_and_members(batch)
    assert members is not None
    assert members.shape == (3, len(batch))
    for i, (row, start) in enumerate(unpadded(batch)):
        ids, read = torch.tensor([row]), slice(start if pooling == "mean" else -1, None)
        alone = [
            (float((m.base_model(ids).last_hidden_state[0, read] @ m.score.weight[0]).mean()) - mean) / std
            for m, (mean, std) in zip(models, units, strict=True)
        ]
        middle = sum(alone) / 3
        sd = (sum((x - middle) ** 2 for x in alone) / 3) ** 0.5
        expected = {"mean": middle, "min": min(alone), "mean-sd": middle - 0.7 * sd}[combine]
        assert raw[i].item() == pytest.approx(expected, abs=1e-5)
        normal = ensemble.normalised(raw)[i].item()
        assert normal == pytest.approx((expected - 0.3) / 4, abs=1e-5)
        by_token = ensemble.per_position(batch, batch.response)[i]
        assert by_token[len(row) - 1].item() == pytest.approx(expected, abs=1e-5)
        assert (by_token[:start] == 0).all()


@pytest.mark.parametrize("name", LOOKUPS)
def test_new_tensors_are_where_the_inputs_are(name: str) -> None:
    """Here inputs are elsewhere than tensors made without a device, as on a GPU."""
    look, batch = LOOKUPS[name](), sequences(3)
    with torch.device("meta"):
        assert look(batch).device == batch.ids.device
