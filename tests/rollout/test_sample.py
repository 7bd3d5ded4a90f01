"""The sampler draws from softmax(logits / T), and a response depends on its prompt and its seed alone."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from preftune.data import Prompts, Sequences, pad_prompts, pad_sequences
from preftune.functional import response_mask
from preftune.models.roles import Policy
from preftune.rollout import sample as module
from preftune.rollout.sample import ended, sample
from tiny import EOS, VOCABULARY, causal_lm, prompts, rows, widened

LIMIT = 12


def draw(
    policy: Policy, batch: Prompts, temperature: float = 1.0, limit: int = LIMIT, k: int = 1
) -> Sequences:
    return sample(
        policy, batch, max_new_tokens=limit, temperature=temperature, eos_id=EOS, responses_per_prompt=k
    )


def responses(batch: Sequences) -> list[list[int]]:
    return [ids[own].tolist() for ids, own in zip(batch.ids, batch.response, strict=True)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(causal_lm(1))


def frequencies_agree(counts: Tensor, p: Tensor) -> float:
    """p-value of a chi-square test; cells with fewer than 5 expected draws are taken together."""
    expected = p.double() * counts.sum()
    rare = expected < 5
    cells = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    keep = wanted > 0.5
    cells, wanted = cells[keep], wanted[keep]
    return float(stats.chisquare(cells.numpy(), (wanted * cells.sum() / wanted.sum()).numpy()).pvalue)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@torch.no_grad()
def test_draws_follow_the_softmax_at_the_temperature(policy: Policy, temperature: float) -> None:
    """3,000 draws of the first token, and of the second given the most frequent first."""
    prompt, n = [3, 1, 4], 3000
    out = draw(policy, pad_prompts([prompt] * n, range(n), EOS), temperature, limit=2)
    first = out.ids[:, 3]
    after = lambda ids: policy.model(torch.tensor([ids])).logits[0, -1]  # noqa: E731
    counts = torch.bincount(first, minlength=VOCABULARY)
    p = torch.softmax(after(prompt).double() / temperature, -1)
    assert frequencies_agree(counts, p) > 1e-3
    wrong = torch.softmax(after(prompt).double() / (temperature * 1.5), -1)
    assert frequencies_agree(counts, wrong) < 1e-6  # the test can fail
    top = int(torch.where(torch.arange(VOCABULARY) == EOS, -1, counts).argmax())
    second = out.ids[first == top, 4]
    p = torch.softmax(after([*prompt, top]).double() / temperature, -1)
    assert frequencies_agree(torch.bincount(second, minlength=VOCABULARY), p) > 1e-3


@torch.no_grad()
def test_greedy_is_the_argmax_of_full_forwards(policy: Policy) -> None:
    batch = prompts(0, 6)
    got = responses(draw(policy, batch, temperature=0))
    for i, prompt in enumerate(rows(0, 6)[0]):
        written: list[int] = []
        while len(written) < LIMIT and EOS not in written:
            written.append(int(policy.model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
        assert got[i] == written


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_is_the_same_alone_and_in_any_company(policy: Policy, temperature: float) -> None:
    """Left padding, position ids, finished neighbours and their order leave it alone."""
    texts, _ = rows(2, 8)
    assert len({len(text) for text in texts}) > 3
    seeds = [100 + i for i in range(8)]
    together = responses(draw(policy, pad_prompts(texts, seeds, EOS), temperature))
    if temperature:
        assert len({len(r) for r in together}) > 2  # some end early, some do not
    for i in range(8):
        alone = responses(draw(policy, pad_prompts([texts[i]], [seeds[i]], EOS), temperature))
        assert alone == [together[i]]
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = draw(policy, pad_prompts([texts[i] for i in order], [seeds[i] for i in order], 0), temperature)
    assert responses(shuffled) == [together[i] for i in order]


def test_responses_stop_at_the_first_eos_and_contain_it(policy: Policy) -> None:
    out = draw(policy, prompts(3, 40))
    closed = ended(out, EOS)
    assert 0 < int(closed.sum()) < 40
    for response, has_ended in zip(responses(out), closed.tolist(), strict=True):
        assert 1 <= len(response) <= LIMIT
        assert response.count(EOS) == int(has_ended)
        assert (response[-1] == EOS) == has_ended
        assert has_ended or len(response) == LIMIT


def test_a_prompt_alone_has_not_ended() -> None:
    """EOS is the response's: that of a prompt without one does not count, not even beside finished rows."""
    assert ended(pad_sequences([[EOS], [5, EOS]], [[], []], EOS), EOS).tolist() == [False, False]
    assert ended(pad_sequences([[5, EOS], [5]], [[], [EOS]], EOS), EOS).tolist() == [False, True]
    assert ended(pad_sequences([[EOS]], [[]], EOS), EOS).tolist() == [False]  # one column


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (0.2, 3), (1 - 2**-24, 4)])
def test_a_token_of_probability_0_is_never_drawn(uniform: float, token: int) -> None:
    """At either end of the vocabulary; 0 and 1 - 2⁻²⁴ are the outermost numbers that the generator gives."""
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, 1.0, 2.0, -torch.inf]])
    assert module._draw(logits, torch.tensor([uniform]), 1.0).item() == token


def test_logits_that_are_not_numbers_give_some_token_and_spare_other_rows() -> None:
    """Of less than a block of tokens, and of two and a part: the log-probs of the training forward tell."""
    for size in (100, 700):
        logits = torch.zeros(3, size)
        logits[0], logits[1, 5] = torch.nan, torch.inf
        tokens = module._draw(logits, torch.full((3,), 0.5), 1.0)
        assert tokens[:2].max() < size
        assert tokens[2] == size // 2


@pytest.mark.parametrize("size", [100, 256, 700])  # less than a block of tokens, one, two and a part
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(size: int, temperature: float) -> None:
    """Against float64 over the whole vocabulary; as sure as rounding allows where two tokens meet."""
    generator = torch.Generator().manual_seed(size)
    logits, uniform = 2 * torch.randn(500, size, generator=generator), torch.rand(500, generator=generator)
    ends = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    target = uniform.double().unsqueeze(1)
    expected = torch.searchsorted(ends, target, right=True).squeeze(1)
    clear = (ends - target).abs().amin(1) > 1e-6
    assert clear.sum() > 480
    assert len(expected.unique()) > 60
    assert torch.equal(module._draw(logits, uniform, temperature)[clear], expected[clear])


def test_a_draw_does_not_depend_on_the_level_of_the_logits() -> None:
    """Rows a thousand above and below the others: neither overflows, neither vanishes."""
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randint(-8, 8, (6, 300), generator=generator) / 4, torch.linspace(0.05, 0.95, 6)
    level = torch.tensor([1024.0, -1024.0, 0.0]).repeat(2).unsqueeze(1)
    expected = module._draw(logits, uniform, 1.0)
    assert torch.equal(module._draw(logits + level, uniform, 1.0), expected)
    assert torch.equal(module._draw(logits, uniform, 2.0), module._draw(logits / 2, uniform, 1.0))


def test_rows_are_repacked_without_a_gap(policy: Policy) -> None:
    """Prompt, response, then padding: right-padded, with the masks that lengths and EOS give."""
    texts, _ = rows(4, 10)
    texts[3] = [EOS, 5, EOS]  # EOS in a prompt is text like any other
    out = draw(policy, pad_prompts(texts, range(10), EOS))
    columns = torch.arange(out.ids.shape[1])
    longest = 0
    for i, text in enumerate(texts):
        length = int(out.attention[i].sum())
        longest = max(longest, length)
        assert out.ids[i, : len(text)].tolist() == text
        assert torch.equal(out.attention[i], columns < length)
        assert torch.equal(out.response[i], (columns >= len(text)) & (columns < length))
        assert (out.ids[i, length:] == EOS).all()
    assert out.ids.shape[1] == longest
    starts = torch.tensor([len(text) for text in texts])
    by_rule = response_mask(out.ids, EOS, starts) & (columns < (starts + LIMIT).unsqueeze(1))
    assert torch.equal(by_rule, out.response)


def test_seeds_decide(policy: Policy) -> None:
    batch = prompts(5, 6)
    first = responses(draw(policy, batch))
    torch.manual_seed(99)  # the global generator has no say
    assert responses(draw(policy, batch)) == first
    other = Prompts(batch.ids, batch.attention, tuple(s + 1 for s in batch.seeds))
    assert responses(draw(policy, other)) != first


def test_a_longer_limit_only_adds_tokens(policy: Policy) -> None:
    short, long = (responses(draw(policy, prompts(6, 10), limit=n)) for n in (3, 20))
    assert [response[:3] for response in long] == short


def test_responses_to_one_prompt_follow_each_other_and_differ(policy: Policy) -> None:
    batch = prompts(7, 5)
    single, several = responses(draw(policy, batch)), responses(draw(policy, batch, k=3))
    assert several[::3] == single
    assert all(len({tuple(r) for r in several[i : i + 3]}) > 1 for i in range(0, 15, 3))


@torch.no_grad()
def test_the_samplers_probabilities_are_those_of_the_training_forward(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache, left padding and position ids against one plain right-padded pass, at the same temperature."""
    seen: list[Tensor] = []
    original = module._draw

    def recording(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
        token = original(logits, uniform, temperature)
        seen.append(torch.log_softmax(logits.double() / temperature, -1).gather(1, token.unsqueeze(1)))
        return token

    monkeypatch.setattr(module, "_draw", recording)
    texts, _ = rows(8, 6)
    out = sample(policy, pad_prompts(texts, range(6), 0), max_new_tokens=9, temperature=0.7, eos_id=-1)
    trained = policy.logprobs(widened(out, 0), 0.7)[out.response].view(6, 9)
    torch.testing.assert_close(torch.cat(seen, 1), trained.double(), atol=1e-5, rtol=0)


def test_new_tensors_are_where_the_prompts_are(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here prompts are elsewhere than tensors made without a device, as on a GPU."""
    batch, uniforms = prompts(5, 6), module._uniforms(prompts(5, 6).seeds, 1, LIMIT)
    monkeypatch.setattr(module, "_uniforms", lambda *_: uniforms)  # drawn on the CPU, moved by the caller
    with torch.device("meta"):
        out = draw(policy, batch)
    assert {out.ids.device, out.attention.device, out.response.device} == {batch.ids.device}


@torch.no_grad()
def test_the_policys_precision_is_that_of_sampling(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = module.next_logits
    monkeypatch.setattr(module, "next_logits", lambda *given: seen.append(original(*given)) or seen[-1])
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(policy, "dtype", dtype)
        draw(policy, prompts(5, 6), limit=1)
    assert all(logits.dtype == torch.float32 for logits in seen)
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[1], atol=0.2, rtol=0.1)
