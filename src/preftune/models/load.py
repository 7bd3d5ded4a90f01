"""Loading tokenizers and models from where `locate` found them: safetensors only, no code, float32."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from preftune.errors import DataError, InputMissing
from preftune.models.aligned import aligned
from preftune.models.check import check_causal_lm
from preftune.models.complete import complete_lm
from preftune.models.locate import Source, reading


def quiet_libraries() -> None:
    """No progress bars or notices from transformers: what a user must know, preftune says itself."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. It must have an EOS token; a pad token is not needed, since masks rule."""
    with reading(source, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    if len(tokenizer) <= len(
        tokenizer.all_special_tokens
    ):  # made up by transformers where there are no files
        raise InputMissing(
            f"no usable tokenizer in {source.path}: it knows no token but special ones",
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {source.path} has no EOS token",
            hint="set eos_token in tokenizer_config.json: without it no model can learn to stop",
        )
    _check_vocabulary(source, tokenizer)
    return tokenizer


def _check_vocabulary(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every id must have an embedding: one that has none is an index out of range in the middle of a run."""
    if not (Path(source.path) / "config.json").is_file():
        return
    with reading(source, "the config"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False).get_text_config()
    rows = getattr(config, "vocab_size", None)
    ids = tokenizer.get_vocab()
    # No text spells a special token: one that nothing else writes, as Gemma 3's for an image, may be above.
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    written = f"{named} {tokenizer.chat_template}"
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    highest = max(ids[token] for token in ids if token not in special or token in written)
    if isinstance(rows, int) and highest >= rows:
        raise DataError(
            f"the tokenizer of {source.path} has ids up to {highest}, the model has {rows} embeddings",
            hint="model.resize_token_embeddings(len(tokenizer)) and save both, or use the model's tokenizer",
        )


def load_causal_lm(source: Source) -> PreTrainedModel:
    """A causal language model in float32, in eval mode: dropout is off everywhere in preftune."""
    _refuse_classifier(source)
    with reading(source, "a causal language model"):
        model = complete_lm(source.path, use_safetensors=True)
    check_causal_lm(aligned(model.eval()), source.path)
    return model


def _refuse_classifier(source: Source) -> None:
    """A reward model's backbone would pass for a language model, since the head of one is tied."""
    with reading(source, "the config"):
        names = AutoConfig.from_pretrained(source.path, trust_remote_code=False).architectures or []
        is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    if is_classifier:
        raise DataError(
            f"{source.path} holds a reward model, not a language model", hint="give a policy's directory"
        )


def scratch_gpt2(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, heads: int, positions: int, seed: int
) -> PreTrainedModel:
    """A GPT-2 with random weights for the given tokenizer. `gelu_pytorch_tanh` is `gelu_new`, fused."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)  # the library allows lists; `load_tokenizer` and the world's give one number
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def declared_ends(source: Source) -> tuple[int, ...]:
    """Every id at which `generate` of a model ends a reply: `eos_token_id` of generation_config.json, of
    config.json and of its part for text; each may be one id or a list of them (Gemma, Llama 3, Phi-3).
    """
    with reading(source, "the config"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        configs = (config, config.get_text_config())
        stated = [getattr(settings, "eos_token_id", None) for settings in configs]
        if not source.exists() or (Path(source.path) / "generation_config.json").is_file():
            with suppress(OSError):  # a hub model without that file
                settings = GenerationConfig.from_pretrained(source.path, trust_remote_code=False)
                stated.append(settings.eos_token_id)
    ids = (i for entry in stated for i in (entry if isinstance(entry, list | tuple) else [entry]))
    return tuple(sorted({i for i in ids if isinstance(i, int) and i >= 0}))


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the tokens and their ids, special and added ones included."""
    items = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(items, ensure_ascii=True).encode()).hexdigest()


def context_length(source: Source) -> int:
    """How many positions a saved model can take; 0 if its config states none."""
    with reading(source, "the config"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False).get_text_config()
        return max(0, int(getattr(config, "max_position_embeddings", 0) or 0))
