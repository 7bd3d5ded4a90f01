"""Adapters on 4-bit weights: the numbers of transformers, bitsandbytes and peft, on a CPU."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from families import PLAIN, TREES, made
from peft_oracle import ADAM, ALPHA, RANK, RATE, peft_model, trained, update_three_times
from preftune.algorithms import ALGORITHMS
from preftune.errors import BackendMissing, ConfigError, DataError
from preftune.models.adapter import adapt, fold, hold_once, linear_layers, save_adapter
from preftune.models.fast.support import takes_trees
from preftune.models.quantised import BITS, backend, computes_in, quantise, scales
from preftune.models.roles import Policy, Reference, RewardModel, Role, quantise_role
from preftune.rollout.sample import sample
from preftune.training.learner import Learner
from tiny import EOS, pairs, prompts, sequences, state, step

FAMILIES = {**TREES, **PLAIN}
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes: pip install -c constraints.txt 'preftune[qlora]'",
)


def fresh(family: str, kind: type = AutoModelForCausalLM) -> PreTrainedModel:
    model = made(FAMILIES[family](), kind).eval()
    if kind is AutoModelForSequenceClassification:
        model.config.pad_token_id = 0
    return model


def theirs(family: str, place: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model as transformers loads it in 4 bits. Without bitsandbytes' other format for some CPUs, which
    has no gradient in eval mode.
    """
    fresh(family, kind).save_pretrained(place)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],
    )
    model = kind.from_pretrained(place, quantization_config=how, device_map="cpu", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, backend().nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def in_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    quantise_role(Policy(model))
    return model


def shaken(family: str) -> PreTrainedModel:
    """In 4 bits, with an adapter that changes the numbers."""
    model = in_four_bits(Policy(fresh(family)).model)
    adapt(model, RANK, ALPHA, seed=3)
    shake(model, 0.3, seed=4)
    return model


def shake(model: PreTrainedModel, size: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(size * torch.randn(p.shape, generator=random))


FORMULAS = [("gpt2", "dpo"), ("llama", "dpo"), ("opt", "sft"), ("gpt2", "reward")]


@needs_bitsandbytes
@pytest.mark.parametrize(("family", "algorithm"), FORMULAS)
def test_three_updates_are_those_of_bitsandbytes_and_peft(
    family: str, algorithm: str, tmp_path: Path
) -> None:
    kind, learner = ALGORITHMS[algorithm], Learner(microbatch_size=3)
    roles: dict[str, Role] = {}
    if algorithm == "reward":
        classes = AutoModelForSequenceClassification
        roles["reward_model"], plain = RewardModel(fresh(family, classes)), theirs(family, tmp_path, classes)
    else:
        roles["policy"], plain = Policy(fresh(family)), theirs(family, tmp_path)
    if "reference" in kind.needs:
        roles["reference"] = Reference(fresh(family))
    for each in roles.values():
        in_four_bits(each.model)
    role = roles[kind.trains[0]]
    adapt(role.model, RANK, ALPHA, seed=3)
    hold_once([each.model for each in roles.values()])
    if "reference" in roles:
        learner.freeze(roles["reference"])
    oracle = peft_model(plain, role.model)
    before = state(role.model)
    update_three_times(algorithm, roles, learner, oracle)
    after = state(role.model)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in after if ".lora_" in name or name == "score.weight"}
    for name, p in trained(oracle).items():
        assert (after[name] - p).abs().max() <= 2e-6, name


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    """The layers, their numbers, and what is left as it was."""
    trees, model, other = takes_trees(fresh(family)), fresh(family), theirs(family, tmp_path)
    plain, ids = state(model), sequences(2).ids
    in_four_bits(model)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, other(ids).logits, atol=2e-6)
        assert not torch.allclose(model(ids).logits, fresh(family)(ids).logits, atol=0.1)
    ours, four = (
        dict(model.named_parameters()),
        {n for n, p in other.named_parameters() if p.dtype == torch.uint8},
    )
    assert four == {name for name, p in ours.items() if p.dtype == torch.uint8}
    assert all(torch.equal(p, plain[name]) for name, p in ours.items() if name not in four)
    assert takes_trees(model) == trees


@needs_bitsandbytes
def test_the_frozen_weights_take_4_13_bits_and_lie_in_memory_once() -> None:
    """64 weights have a scale of 8 bits, 256 scales one of 32; a layer's two tables come on top."""
    config = TREES["llama"]()
    config.hidden_size, config.intermediate_size = 128, 256
    policy, reference = (in_four_bits(made(config).eval()) for _ in range(2))
    adapt(policy, RANK, ALPHA, seed=3)
    hold_once([policy, reference])
    four = {name: p for name, p in reference.named_parameters() if p.dtype == torch.uint8}
    count = 2 * sum(p.numel() for p in four.values())
    assert count == sum(layer.weight.numel() for layer in linear_layers(made(config)).values())
    tables = ("quant_map", "bitsandbytes__nf4")
    held = [*four.values(), *(x for name, x in scales(reference).items() if not name.endswith(tables))]
    assert 8 * sum(x.numel() * x.element_size() for x in held) == pytest.approx(BITS * count, rel=1e-3)
    places = {name.replace(".base_layer", ""): p.data_ptr() for name, p in policy.named_parameters()}
    assert all(places[name] == p.data_ptr() for name, p in reference.named_parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_replies_are_drawn_from_what_is_trained(family: str) -> None:
    """Greedy tokens have the highest log-probability of the learner's own pass; nothing is rounded anew."""
    model = shaken(family)
    before = {**state(model), **scales(model)}
    batch = sample(Policy(model), prompts(1), max_new_tokens=8, temperature=0.0, eos_id=EOS)
    with torch.no_grad():
        logits = model(batch.ids, attention_mask=batch.attention.long()).logits
    likely = logits[:, :-1].argmax(-1)[batch.response[:, 1:]]
    assert len(likely) > 8
    assert torch.equal(likely, batch.ids[batch.response])
    after = {**state(model), **scales(model)}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_trained_in_float(family: str, tmp_path: Path) -> None:
    """Merged, it gives the same to rounding; peft reads its adapter on transformers' own 4-bit model."""
    model, base, ids = shaken(family), fresh(family), sequences(2).ids
    with torch.no_grad():
        trained = model(ids).logits
    folded = fold(model)
    assert folded is not None
    save_adapter(folded, tmp_path / "adapter", "some/base")
    four = theirs(family, tmp_path / "base")
    other: Any = peft.PeftModel.from_pretrained(four, tmp_path / "adapter").eval()
    bound = 1e-5 * float(trained.abs().max())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, trained, atol=bound)
        assert torch.allclose(other(ids).logits, trained, atol=bound)
    plain, found = state(base), state(model)
    assert {name: (w.shape, w.dtype) for name, w in plain.items()} == {
        name: (w.shape, w.dtype) for name, w in found.items()
    }
    layers = {f"{name}.weight" for name in linear_layers(base)}
    assert layers == {name for name, weight in found.items() if not torch.equal(weight, plain[name])}


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_stage_starts_from_what_the_stages_before_it_have_learnt(family: str, tmp_path: Path) -> None:
    """Adapters too small for the steps of 4 bits, which quantising the saved model by itself takes back. The
    4-bit numbers are those of the base in every stage; the scales are rounded once more.
    """
    ids, four = sequences(2).ids, list[list[Tensor]]()
    fresh(family).save_pretrained(tmp_path / "0")
    for stage in range(3):
        saved, alone, model = (AutoModelForCausalLM.from_pretrained(tmp_path / str(stage)) for _ in range(3))
        quantise(alone, linear_layers(alone), {})
        in_four_bits(model)
        four.append([p for p in model.parameters() if p.dtype == torch.uint8])
        assert all(map(torch.equal, four[0], four[stage]))
        with torch.no_grad():
            goal, lost, kept = (each.eval()(ids).logits for each in (saved, alone, model))
        if stage:
            assert (kept - goal).abs().mean() < 0.05 * (lost - goal).abs().mean()
        adapt(model, RANK, ALPHA, seed=stage)
        shake(model, 0.01, seed=stage)
        folded = fold(model)
        assert folded is not None
        model.save_pretrained(tmp_path / str(stage + 1))
        save_adapter(folded, tmp_path / str(stage + 1) / "adapter", f"../../{stage}")


@needs_bitsandbytes
def test_an_adapter_of_another_shape_beside_a_model_is_refused(tmp_path: Path) -> None:
    folded = fold(shaken("llama"))
    assert folded is not None
    config = TREES["llama"]()
    config.intermediate_size = 32
    made(config).save_pretrained(tmp_path)
    save_adapter(folded, tmp_path / "adapter", "some/base")
    with pytest.raises(DataError, match=r"beside the model has another model\.layers\.0\.mlp"):
        in_four_bits(AutoModelForCausalLM.from_pretrained(tmp_path))


@needs_bitsandbytes
def test_a_reward_model_scores_as_its_saved_one() -> None:
    model, batch = fresh("gpt2", AutoModelForSequenceClassification), sequences(3)
    in_four_bits(RewardModel(model).model)
    adapt(model, RANK, ALPHA, seed=3)
    with torch.no_grad():
        scores = RewardModel(model).raw_scores(batch)
        fold(model)
        assert torch.allclose(RewardModel(model).raw_scores(batch), scores, atol=1e-5)


@needs_bitsandbytes
def test_in_bf16_products_are_bf16_and_the_saved_biases_are_the_bases() -> None:
    """bitsandbytes computes in the type of its first input otherwise, and rounds biases for good."""
    learner, roles = Learner("bf16"), {"policy": Policy(fresh("gpt2")), "reference": Reference(fresh("gpt2"))}
    for role in roles.values():
        in_four_bits(role.model)
    adapt(roles["policy"].model, RANK, ALPHA, seed=3)
    learner.freeze(roles["reference"])
    learner.train("policy", roles["policy"], ADAM, RATE)
    algo = ALGORITHMS["dpo"](ALGORITHMS["dpo"].Config(algorithm="dpo"), roles, learner)
    assert step("dpo", algo, pairs(5))["loss"] == pytest.approx(0.6931, abs=1e-3)
    layer = linear_layers(roles["reference"].model)["transformer.h.0.attn.c_attn"]
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    sample(roles["policy"], prompts(1), max_new_tokens=2, temperature=1.0, eos_id=EOS)
    fold(roles["policy"].model)
    plain, found = state(fresh("gpt2")), state(roles["policy"].model)
    assert all(w.dtype == torch.float32 for w in found.values())
    assert all(torch.equal(w, plain[name]) for name, w in found.items() if name.endswith("bias"))


@needs_bitsandbytes
def test_a_device_without_4_bit_weights_is_refused() -> None:
    model = in_four_bits(fresh("gpt2"))
    with pytest.raises(ConfigError, match="no 4-bit weights on meta"):
        computes_in(model, torch.float32, torch.device("meta"))


def test_without_bitsandbytes_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackendMissing, match="needs bitsandbytes") as caught:
        backend()
    assert "preftune[qlora]" in caught.value.hint
