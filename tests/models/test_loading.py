"""Models on disk: what is written comes back bit for bit, and nothing random, pickled or foreign gets in."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaModel

from preftune.data.corpus import train_tokenizer
from preftune.errors import DataError, InputMissing, PreftuneError, StorageError
from preftune.models.adapter import adapt, fold, save_adapter
from preftune.models.load import (
    context_length,
    declared_ends,
    load_causal_lm,
    load_tokenizer,
    scratch_gpt2,
    vocabulary_hash,
)
from preftune.models.locate import Source, _cached, locate
from preftune.models.roles import RewardModel
from preftune.models.scalar import init_scalar_model, load_scalar_model
from tiny import causal_lm, classifier, same_weights, sequences, state


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A causal LM that lacks nothing but a tokenizer."""
    causal_lm(1).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_a_saved_reward_model_scores_the_same_bit_for_bit(tmp_path: Path) -> None:
    before, batch = RewardModel(classifier(3)), sequences(0)
    before.model.save_pretrained(tmp_path)
    after = RewardModel(load_scalar_model(Source(str(tmp_path))))
    assert same_weights(state(after.model), state(before.model))
    assert torch.equal(after.raw_scores(batch), before.raw_scores(batch))


def test_a_new_head_follows_its_seed_and_its_scale(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([], 257)
    backbone = scratch_gpt2(tokenizer, layers=1, width=256, heads=2, positions=16, seed=0)
    backbone.save_pretrained(tmp_path)
    source = Source(str(tmp_path))
    first, again, other = (init_scalar_model(source, train_tokenizer([], 257), seed) for seed in (0, 0, 1))
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.bias is None  # a bias would be lost on the way through a saved directory
    # n = 256 draws of N(0, 1/257): the sample sd is within 4.5 of its standard errors 1/sqrt(2n)
    assert first.score.weight.std().item() * 257**0.5 == pytest.approx(1.0, abs=4.5 / (2 * 256) ** 0.5)
    halved = init_scalar_model(source, train_tokenizer([], 257), 0, scale=0.5)
    assert torch.equal(halved.score.weight, first.score.weight / 2)
    silent = RewardModel(init_scalar_model(source, train_tokenizer([], 257), 0, scale=0.0))
    assert silent.raw_scores(sequences(0)).tolist() == [0.0] * len(sequences(0).ids)
    assert first.config.pad_token_id == len(tokenizer)  # a row of its own after the last token
    assert first.config.pad_token_id != tokenizer.eos_token_id
    assert torch.equal(first.transformer.wte.weight[:-1], backbone.transformer.wte.weight)
    assert same_weights(state(first), state(again))


def test_a_spare_row_of_the_embedding_is_the_pad_tokens_as_it_is(tmp_path: Path) -> None:
    """So the blocks below stay those of the policy: zeros in the middle would be another embedding."""
    tokenizer = train_tokenizer([], 257)
    model = causal_lm(1, vocabulary=300)
    model.save_pretrained(tmp_path)
    judge = init_scalar_model(Source(str(tmp_path)), tokenizer, seed=0)
    assert judge.config.pad_token_id == 257
    assert torch.equal(judge.transformer.wte.weight, model.transformer.wte.weight)


SETTINGS = [
    *({"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.7}, {"pad_token_id": -1}),
    {"penalty_alpha": 0.6, "top_k": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_for_generate_that_cannot_be_written_are_left_out(
    settings: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    """The library reads them, and refuses to write them when the first stage is trained."""
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 4], "repetition_penalty": 1.5, **settings})
    )
    model = load_causal_lm(locate(str(directory)))
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["repetition_penalty"]) == ([3, 4], 1.5)
    assert not settings.items() <= written.items()


def test_an_adapter_on_a_base_without_its_head_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged, its random head would pass for a whole model's."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=257, eos_token_id=9, bos_token_id=9, **size))
    adapt(base, 2, 4, seed=0)
    adapter = fold(base)
    assert adapter is not None
    save_adapter(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    base.model.save_pretrained(tmp_path / "base")
    train_tokenizer([], 257).save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        locate(str(tmp_path / "adapter"))


def test_ends_of_a_config_of_several_parts_are_those_of_its_text(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "eos_token_id": [1, 106]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert declared_ends(Source(str(tmp_path))) == (1, 106)


def test_a_causal_lm_is_no_reward_model(directory: Path) -> None:
    with pytest.raises(DataError, match="holds a language model, not a reward model"):
        load_scalar_model(Source(str(directory)))


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would draw a random one and go on."""
    model = classifier(3)
    kept = {name: weight for name, weight in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(DataError, match=r"score\.weight") as caught:
        load_scalar_model(Source(str(tmp_path)))
    assert "random" in caught.value.hint


def test_a_classifier_with_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=10, n_positions=8, n_embd=4, n_layer=1, n_head=1, num_labels=3, eos_token_id=9
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"reward model .* other shapes"):
        load_scalar_model(Source(str(tmp_path)))


def test_a_causal_lm_without_its_head_is_refused(tmp_path: Path) -> None:
    """A backbone saved alone: transformers would draw a random head and go on."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, eos_token_id=9, bos_token_id=9, **size)
    LlamaModel(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        load_causal_lm(Source(str(tmp_path)))


def test_a_causal_lm_comes_back_bit_for_bit_and_in_eval_mode(directory: Path) -> None:
    model = load_causal_lm(locate(str(directory)))
    assert same_weights(state(model), state(causal_lm(1)))
    assert not model.training
    assert context_length(Source(str(directory))) == 40


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(causal_lm(1).state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(InputMissing, match="safetensors") as caught:
        locate(str(directory))
    assert "pickled" in caught.value.hint
    with pytest.raises(InputMissing):
        load_causal_lm(Source(str(directory)))  # nor does a path around the check read them


def test_a_directory_that_brings_code_is_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_evil.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(DataError, match="auto_map"):
        locate(str(directory))


@pytest.mark.parametrize(("content", "words"), [(None, "config.json"), ("{", "JSON"), ("[]", "JSON object")])
def test_a_broken_config_is_named(directory: Path, content: str | None, words: str) -> None:
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    with pytest.raises(PreftuneError, match=words):
        locate(str(directory))


def test_a_model_without_a_tokenizer_is_named(directory: Path) -> None:
    with pytest.raises(InputMissing, match="tokenizer"):
        load_tokenizer(Source(str(directory)))


@pytest.mark.parametrize("offline", ["1", ""])
def test_a_hub_that_is_out_of_reach_fails_at_once(offline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine: nothing answers there. HF_HUB_OFFLINE says so without asking. The hub's client,
    which asks again and again, is not reached.
    """
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *names: asked.append(str(names)))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(InputMissing, match="nobody/no-such-model") as caught:
        locate("nobody/no-such-model")
    assert asked == []
    assert "model.base=DIR" in caught.value.hint
    assert "quickstart" in caught.value.hint


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "a/b/c", "missing.gguf"])
def test_a_path_is_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(InputMissing, match="no such"):
        locate(name)


def test_the_vocabulary_hash_sees_every_token_and_id() -> None:
    one, other = train_tokenizer([], 257), train_tokenizer([], 257)
    assert vocabulary_hash(one) == vocabulary_hash(other)
    other.add_tokens(["more"])
    assert vocabulary_hash(one) != vocabulary_hash(other)


def written(to: Path) -> None:
    to.mkdir()
    (to / "config.json").write_text("{}")


def test_a_converted_model_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(to: Path) -> None:
        raise OSError(28, "No space left on device")

    def faster(partial: Path, target: Path) -> None:
        written(target)
        replace(partial, target)

    model, target, replace = SimpleNamespace(save_pretrained=written), tmp_path / "target", os.replace
    with pytest.raises(StorageError, match="No space left"):
        _cached(target, model, SimpleNamespace(save_pretrained=full))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", faster)  # another process
    assert _cached(target, model, SimpleNamespace(save_pretrained=lambda to: None)) == Source(str(target))
    assert list(tmp_path.iterdir()) == [target]
