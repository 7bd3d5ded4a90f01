"""Tiny models of the families that may be laid out as trees, and of two that may not."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tiny import VOCABULARY

_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_WIDE = {"initializer_range": 0.3, "pad_token_id": 22}  # large weights, so that a wrong neighbour shows
TREES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, **_WIDE),
    "llama": lambda: LlamaConfig(**_SIZE, **_WIDE, num_key_value_heads=2, intermediate_size=24),
    "qwen2": lambda: Qwen2Config(**_SIZE, **_WIDE, num_key_value_heads=2, intermediate_size=24),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZE, **_WIDE, intermediate_size=24),
    "opt": lambda: OPTConfig(**_SIZE, **_WIDE | {"init_std": 0.3}, ffn_dim=24, word_embed_proj_dim=16),
}
PLAIN: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral with a window": lambda: MistralConfig(
        **_SIZE, **_WIDE, num_key_value_heads=2, intermediate_size=24, sliding_window=4
    ),
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=4, **_WIDE),  # ALiBi
}


def made(config: PreTrainedConfig, kind: type = AutoModelForCausalLM) -> PreTrainedModel:
    config.vocab_size, config.num_labels = VOCABULARY, 1
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return kind.from_config(config)
