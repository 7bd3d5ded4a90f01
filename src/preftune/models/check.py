"""Whether a causal language model can be trained and sampled here: tried on a few tokens, not told by name.

`load_causal_lm` refuses a model that fails; `preftune audit` prints the same words; a run checks before its
first stage.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from preftune.errors import DataError, is_out_of_memory
from preftune.models.fast.decode import CachedDecoder
from preftune.models.locate import Source, first_line, reading
from preftune.models.roles import logits_of
from preftune.models.scalar import score_head

FAMILIES = "GPT-2, Llama, Qwen2, Gemma 2, OPT, GPT-NeoX and BLOOM are supported"
_NEAR = 1e-4  # of the largest number that is compared; float32 rounding stays far below
_LENGTH = 8  # tokens of the trial rows


class Finding(NamedTuple):
    """One question about a model: `wrong` is empty where the answer is as it should be."""

    name: str
    wrong: str
    hint: str


def check_causal_lm(model: PreTrainedModel, where: str) -> None:
    """DataError for the first of `findings` that is wrong."""
    for finding in findings(model):
        if finding.wrong:
            raise DataError(f"{where} ({type(model).__name__}) {finding.wrong}", finding.hint)


@torch.no_grad()
def findings(model: PreTrainedModel) -> Iterator[Finding]:
    """Finite, causal, no dropout, a head that is understood, and a cache that changes nothing. Ends after the
    first that is wrong.
    """
    for name, ask, hint in _QUESTIONS:
        try:
            wrong = ask(model)
        except Exception as error:  # whatever a foreign model raises, here or later in training
            if is_out_of_memory(error):
                raise
            wrong = f"cannot be used as one: {type(error).__name__}: {first_line(error)}"
        yield Finding(name, wrong, hint)
        if wrong:
            return


def _rows(model: PreTrainedModel) -> Tensor:
    """The same row twice, and the row with another token in the middle and at the end: (4, _LENGTH)."""
    embeddings: Any = model.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    rows = (torch.arange(_LENGTH) * 7 + 1).repeat(4, 1) % size
    for row, column in ((2, _LENGTH // 2), (3, _LENGTH - 1)):
        rows[row, column] = (rows[row, column] + size // 2) % size
    return rows.to(next(model.parameters()).device)


def _logits(model: PreTrainedModel) -> Tensor:
    return model(_rows(model), use_cache=False).logits.float()


def _far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > _NEAR * b.abs().max().clamp(min=1e-6))


@torch.no_grad()
def divergence(model: PreTrainedModel) -> str:
    """What is not finite about a model: its weights, or the logits of a few tokens; "" if all is well."""
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        return f"has weights that are NaN or infinite ({', '.join(broken[:3])}): its training diverged"
    return "" if bool(_logits(model).isfinite().all()) else "gives logits that are not finite: it diverged"


def _causal(model: PreTrainedModel) -> str:
    logits, middle = _logits(model), _LENGTH // 2
    if _far(logits[1], logits[0]):
        return "gives other numbers for the same row: something random is left on"
    leaks = _far(logits[2, :middle], logits[0, :middle]) or _far(logits[3, :-1], logits[0, :-1])
    return "is no causal language model: a token changes the logits before it" if leaks else ""


def _head(model: PreTrainedModel) -> str:
    states = model.base_model(_rows(model), use_cache=False).last_hidden_state
    if _far(logits_of(model, states), _logits(model)):
        return "does something else to its logits after the head, which is not supported"
    return ""


def _cache(model: PreTrainedModel) -> str:
    """The general decoder, two replies to prompts of two lengths, against a forward pass without a cache."""
    rows, k = _rows(model)[2:], 2
    lengths, written = torch.tensor([4, 5], device=rows.device), 3
    ends = lengths.repeat_interleave(k)
    try:
        decoder = CachedDecoder(model, rows[:, :5], lengths, k, written)
        decoder.start()
        states = decoder.step(rows.repeat_interleave(k, 0)[torch.arange(2 * k), ends])
        decoder.keep(torch.tensor([0, 3], device=rows.device))
        states = decoder.step(rows[torch.arange(2), lengths + 1])
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return f"cannot sample with a cache of keys and values ({first_line(error)}): a recurrent layer?"
    uncached = model.base_model(rows, use_cache=False).last_hidden_state
    if _far(states, uncached[torch.arange(2), lengths + 1]):
        return "samples from other numbers with its cache than without: a recurrent layer?"
    return ""


_QUESTIONS: tuple[tuple[str, Callable[[PreTrainedModel], str], str], ...] = (
    ("numbers are finite", divergence, "train it again with a lower learning rate, or in float32"),
    (
        "sees no later token",
        _causal,
        f"every log-probability would have seen the answer; take a decoder ({FAMILIES})",
    ),
    ("head", _head, FAMILIES),
    ("cache", _cache, FAMILIES),
)


def check_scalar_head(source: Source) -> None:
    """DataError unless transformers has a class with one `score` head for the family: what reward models and
    critics are built as. Builds it without weights.
    """
    with reading(source, "the config"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        config.num_labels = 1
        kind = type(config).__name__.removesuffix("Config")
        try:
            with torch.device("meta"):
                score_head(AutoModelForSequenceClassification.from_config(config))
        except (ValueError, DataError) as error:
            raise DataError(
                f"{source.path}: transformers has no class for reward models and critics of family {kind}",
                f"leave out the reward and PPO stages (stage.rm=none), or take another family: {FAMILIES}",
            ) from error
