"""What a base model is asked before anything is trained; and heads that scale or cap their logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    XLNetConfig,
)

from families import PLAIN, TREES, made
from preftune.audit.files import Directory
from preftune.audit.policy import _supported
from preftune.data.corpus import train_tokenizer
from preftune.errors import DataError
from preftune.evaluation.divergence import divergences
from preftune.models.check import check_scalar_head, findings
from preftune.models.load import load_causal_lm, load_tokenizer
from preftune.models.locate import Source
from preftune.models.roles import Policy, Reference
from preftune.rollout.sample import sample
from tiny import EOS, causal_lm, prompts, sequences

_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_MORE = {"num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 22}
_IDS = {"bos_token_id": 22, "eos_token_id": 22}
HEADS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma2": lambda: Gemma2Config(
        **_SIZE, **_MORE, **_IDS, head_dim=4, final_logit_softcapping=1.5, sliding_window=16
    ),
    "cohere": lambda: CohereConfig(**_SIZE, **_MORE, **_IDS, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**_SIZE, **_MORE, **_IDS, logits_scaling=4.0),
}
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "llama that sees all": (
        lambda: LlamaConfig(**_SIZE, **_MORE, **_IDS, is_causal=False),
        "no causal language model",
    ),
    "xlnet": (lambda: XLNetConfig(d_model=16, n_layer=2, n_head=4, d_inner=24), "no causal language model"),
    "bert": (lambda: BertConfig(**_SIZE, intermediate_size=24), "no causal language model"),
    "mamba": (lambda: MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4), "a recurrent layer"),
}


def wrong(model: PreTrainedModel) -> str:
    return "".join(finding.wrong for finding in findings(model.eval()))


@pytest.mark.parametrize("name", [*TREES, *PLAIN, *HEADS])
def test_a_family_that_works_passes(name: str) -> None:
    assert wrong(made({**TREES, **PLAIN, **HEADS}[name]())) == ""


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_work_is_named(name: str, tmp_path: Path) -> None:
    config, words = REFUSED[name]
    model = made(config())
    assert words in wrong(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        load_causal_lm(Source(str(tmp_path)))
    assert type(model).__name__ in caught.value.message


def test_a_model_that_diverged_is_called_so() -> None:
    model = causal_lm(1).eval()
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.inf
    assert "h.0.mlp.c_fc.weight" in wrong(model)
    model = causal_lm(1).eval()
    model.transformer.ln_f.weight.data.mul_(3e38)
    assert "not finite" in wrong(model)


def test_an_unknown_scale_after_the_head_is_refused() -> None:
    model = made(HEADS["granite"]())
    forward = model.forward
    model.forward = lambda *a, **k: _tripled(forward(*a, **k))
    assert "after the head" in wrong(model)


def _tripled(output: object) -> object:
    output.logits = output.logits * 3
    return output


@pytest.mark.parametrize("name", HEADS)
def test_scaled_and_capped_heads_give_the_models_own_logprobs_and_gradients(name: str) -> None:
    model, batch = made(HEADS[name]()).eval(), sequences(3)
    logits = model(batch.ids, attention_mask=batch.attention.long()).logits.float()
    plain = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:].unsqueeze(2)).squeeze(2)
    plain = torch.nn.functional.pad(plain, (1, 0)) * batch.response
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    (plain * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = Policy(model).logprobs(batch)
    (ours * weights).sum().backward()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[parameter], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_scaled_and_capped_heads_are_sampled_and_compared_as_they_are(name: str) -> None:
    """The mean of -log π over draws is the entropy of the model's own distribution; KL to a plain model is
    Σ p (log p - log q) of the models' own logits.
    """
    model, other = made(HEADS[name]()).eval(), causal_lm(2).eval()
    one = prompts(0, 1)
    k = 4000
    draws = sample(Policy(model), one, max_new_tokens=1, temperature=1.0, eos_id=EOS, responses_per_prompt=k)
    with torch.no_grad():
        own = model(one.ids).logits[0, -1].float().log_softmax(-1)
        theirs = other(one.ids).logits[0, -1].float().log_softmax(-1)
    seen = torch.bincount(draws.ids[draws.response], minlength=len(own)) / k
    sd = (own.exp() * (1 - own.exp()) / k).sqrt()
    assert ((seen - own.exp()).abs() <= 5 * sd + 1e-3).all()
    _, exact = divergences(Policy(model), Reference(other), draws[slice(0, 1)], 1.0)
    assert exact[0] == pytest.approx(float((own.exp() * (own - theirs)).sum()), rel=1e-4)


def test_a_family_without_a_scalar_head_is_named(tmp_path: Path) -> None:
    made(HEADS["granite"]()).save_pretrained(tmp_path / "granite")
    with pytest.raises(DataError, match="of family Granite"):
        check_scalar_head(Source(str(tmp_path / "granite")))
    made(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path / "gpt2")
    check_scalar_head(Source(str(tmp_path / "gpt2")))


def test_a_token_without_an_embedding_is_refused_when_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([], 257)
    made(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)  # 23 embeddings
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="ids up to 256, the model has 23 embeddings"):
        load_tokenizer(Source(str(tmp_path)))


def test_a_special_token_that_nothing_writes_needs_no_embedding(tmp_path: Path) -> None:
    """Gemma 3's text models have a token for images beyond their embeddings."""
    tokenizer = train_tokenizer([], 257)
    model = made(GPT2Config(n_embd=16, n_layer=1, n_head=2))
    model.resize_token_embeddings(257)
    model.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(Source(str(tmp_path)))) == 258
    tokenizer.chat_template = "{{ '<image>' }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="ids up to 257, the model has 257 embeddings"):
        load_tokenizer(Source(str(tmp_path)))


def test_the_audit_says_the_same_words(tmp_path: Path) -> None:
    model = made(REFUSED["xlnet"][0]())
    model.save_pretrained(tmp_path)
    directory = Directory(
        path=tmp_path,
        source=Source(str(tmp_path)),
        kind="policy",
        model=model.eval(),
        tokenizer=train_tokenizer([], 257),
        missing=(),
        unexpected=(),
    )
    checks = list(_supported(directory))
    assert checks[0].status == "fault"
    assert "changes the logits before it" in checks[0].found
