"""A backbone with one number per position: reward models and critics.

The Hugging Face class behind it is `AutoModelForSequenceClassification` with one label, so that a saved
reward model loads anywhere. Its own pooling looks for the right-most token that is not `pad_token_id`; that
is right only where pad is a token of its own, which a new one gets (`init_scalar_model`).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from preftune.errors import DataError
from preftune.models.aligned import aligned
from preftune.models.fast.head import uncast
from preftune.models.fast.support import hidden_at, scatter_masked
from preftune.models.layers import token_embedding
from preftune.models.locate import Source, reading

PAD_TOKEN = "<|pad|>"
Pooling = Literal["last", "mean"]  # what a response's score is: that of its last token, or the mean of all


def init_scalar_model(
    source: Source, tokenizer: PreTrainedTokenizerBase, seed: int, scale: float = 1.0
) -> PreTrainedModel:
    """Backbone of a causal LM plus a fresh head w ~ scale * N(0, 1/(d+1)), no bias (Stiennon et al.,
    arXiv:2009.01325, whose scale is 1).

    The tokenizer gets a pad token that is not EOS; the embedding grows by that row.
    """
    # fork_rng, here and below: the library draws weights of its own, which are not kept.
    with reading(source, "the backbone of a reward model"), torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_pretrained(
            source.path, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    used = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, None]
    added = tokenizer.pad_token_id in used
    if added:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    pad: Any = tokenizer.pad_token_id  # the library allows lists; it is one number or none
    grows = pad >= token_embedding(model).num_embeddings  # a spare row will do, as it is: no text has it
    if grows:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(pad + 1, mean_resizing=False)
    model.config.pad_token_id = pad
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        noise = torch.randn(head.weight.shape, generator=generator)
        head.weight.copy_(scale * noise / math.sqrt(head.in_features + 1) + 0.0)  # no -0.0 of a scale 0
        if grows:  # never read under a mask; zero makes the saved file a function of the seed
            token_embedding(model).weight[pad].zero_()
    return aligned(model.eval())


def load_scalar_model(source: Source) -> PreTrainedModel:
    """A saved reward model. DataError if a weight is missing or left over: a random head must not score."""
    with reading(source, "a reward model"), torch.random.fork_rng(devices=[]):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    names: object = model.config.architectures  # of a file from elsewhere: anything
    is_other = isinstance(names, list) and not any(
        str(n).endswith("ForSequenceClassification") for n in names
    )
    if info["missing_keys"] and is_other:
        raise DataError(
            f"{source.path} holds a language model, not a reward model",
            hint="give a reward model's directory",
        )
    wrong = sorted(map(str, {*info["missing_keys"], *info["unexpected_keys"]}))
    if wrong:
        raise DataError(
            f"{source.path} is no complete reward model; missing or unexpected: {', '.join(wrong[:4])}",
            hint="its head would be random; train it again",
        )
    return aligned(model.eval())


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden state to score."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise DataError(
            f"{type(model).__name__} has no one-number `score` head", hint="use a decoder-only model"
        )
    return head


def one_token(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input in place of no rows (0, T): one token that is not read, as ids, attention and mask (1, T). A
    process without rows must not miss a pass in which weights are gathered.
    """
    token = ids.new_zeros(1, ids.shape[1])
    return token, torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) == 0, token.bool()


class ScalarPerPosition(nn.Module):
    """Hidden state to one float32 number where one is read: (ids, attention, read) -> (B, T), 0 elsewhere."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention: Tensor, read: Tensor) -> Tensor:
        if not len(ids):
            return self.forward(*one_token(ids))[:0].clone()  # no view, which a sharded module may not return
        hidden = hidden_at(self.model, ids, attention, read)
        head = score_head(self.model)
        with uncast(hidden.device):  # half would round a score by 0.7 % of the sd of scores
            scores = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
        return scatter_masked(scores, read)


class MeanPerPosition(ScalarPerPosition):
    """The mean of these numbers over the tokens read so far: (ids, attention, response) -> (B, T), 0 where
    none is read. The head is linear, so this is its score of the mean state.
    """

    def forward(self, ids: Tensor, attention: Tensor, read: Tensor) -> Tensor:
        scores = super().forward(ids, attention, read)
        return torch.where(read, scores.cumsum(1) / read.cumsum(1).clamp(min=1), 0.0)


POOLED: dict[Pooling, type[ScalarPerPosition]] = {"last": ScalarPerPosition, "mean": MeanPerPosition}
