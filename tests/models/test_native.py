"""The decoding kernel against torch; compiled here, into a directory of the tests, if there is a compiler."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_decode import IDS, LENGTHS, check, stepped
from torch import nn
from transformers import GPT2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from families import made
from preftune.errors import BackendMissing
from preftune.models.fast import native
from preftune.models.fast.compiled import compile_kernel, library
from preftune.models.fast.decode import GridDecoder
from preftune.models.fast.head import next_logits
from preftune.models.fast.layout import fuse_activations
from preftune.models.roles import Policy
from preftune.rollout.sample import sample, seconds_without_kernel
from preftune.runs.installation import kernel_hint
from preftune.runs.provenance import describe
from tiny import EOS, prompts

HERE = torch.backends.cpu.get_cpu_capability()
VARIANTS = {"AVX512": ["AVX512", "AVX2"], "AVX2": ["AVX2"]}.get(HERE, [])
WIDE = {"initializer_range": 0.3, "pad_token_id": 22}
MODELS = {
    "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=64, **WIDE),
    "llama": lambda: LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        **WIDE,
    ),
}

needs_compiler = pytest.mark.skipif(
    not VARIANTS or not (shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler, or no kernel for this processor",
)


@pytest.fixture(scope="module", params=VARIANTS or [None])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> native.Kernel:
    target = tmp_path_factory.mktemp("native") / "kernel.so"
    return native.Kernel(compile_kernel(request.param, target))


@pytest.fixture
def kernel(built: native.Kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[native.Kernel]:
    """As if it were the one that is built for this processor."""
    monkeypatch.setattr(native, "_built", lambda: built)
    with torch.no_grad():
        yield built


def layer(kind: str, k: int, n: int) -> nn.Module:
    torch.manual_seed(k * n)
    made_one = nn.Linear(k, n) if kind == "linear" else Conv1D(n, k)
    for p in made_one.parameters():
        nn.init.normal_(p, std=k**-0.5)
    return made_one


@needs_compiler
@pytest.mark.parametrize(("k", "n"), [(64, 96), (33, 64), (7, 16), (1600, 80), (768, 208)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_products_are_torchs_for_any_number_of_rows(kernel: native.Kernel, kind: str, k: int, n: int) -> None:
    one = layer(kind, k, n)
    product = native.layer_product(one)
    assert product is not None
    x = torch.randn(64, k)
    expected = one(x)
    for rows in (1, 2, 3, 5, 8, 9, 16, 17, 31, 64):
        torch.testing.assert_close(product(x[:rows]), expected[:rows], atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("n", [1, 2, 3, 31, 100])
def test_odd_numbers_of_columns(kernel: native.Kernel, n: int) -> None:
    one = layer("linear", 48, n)
    x = torch.randn(2, 5, 48)[:, ::2]  # not contiguous, and not a matrix
    product = native.layer_product(one)
    assert product is not None
    torch.testing.assert_close(product(x), one(x), atol=1e-5, rtol=1e-5)
    odd = native.layer_product(layer("conv1d", 48, n))
    assert odd is None  # a Conv1D's columns must fill whole vectors: torch does the others


@needs_compiler
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_row_is_the_same_bit_by_bit_in_any_company(kernel: native.Kernel, kind: str) -> None:
    product = native.layer_product(layer(kind, 777, 112))
    assert product is not None
    x = torch.randn(64, 777)
    together = product(x)
    for rows in (slice(0, 1), slice(3, 8), slice(40, 56), slice(7, 40)):
        assert torch.equal(product(x[rows]), together[rows])


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_decoding_gives_the_states_of_full_forwards(kernel: native.Kernel, name: str) -> None:
    """Products and attention, while rows drop out; nothing of it stays behind in the model."""
    model = fuse_activations(made(MODELS[name]()).eval())
    one = GridDecoder(model, IDS, LENGTHS, 3, 8)
    assert one.few_rows.products
    rows = [ids[:n].tolist() for ids, n in zip(IDS, LENGTHS.tolist(), strict=True) for _ in range(3)]
    one.start()
    for states, left in stepped(one, rows):
        assert not any("forward" in module.__dict__ for module in model.modules())
        with native.without_kernel():
            check(model, states, left)


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_torchs_and_do_not_depend_on_their_neighbours(kernel: native.Kernel, name: str) -> None:
    policy, batch = Policy(made(MODELS[name]())), prompts(3, 5)

    def draw(rows: slice) -> list[list[int]]:
        part = type(batch)(batch.ids[rows], batch.attention[rows], batch.seeds[rows])
        out = sample(policy, part, max_new_tokens=9, temperature=1.0, eos_id=EOS, responses_per_prompt=3)
        return [ids[own].tolist() for ids, own in zip(out.ids, out.response, strict=True)]

    together = draw(slice(0, 5))
    assert draw(slice(2, 3)) == together[6:9]
    with native.without_kernel():
        assert draw(slice(0, 5)) == together


@needs_compiler
def test_logprobs_drift_less_than_the_bar(kernel: native.Kernel) -> None:
    """At most 5e-5 over a vocabulary, with a head as peaked as a trained one's."""
    head, states = layer("linear", 256, 3000), 4 * torch.randn(8, 256)
    ours = torch.log_softmax(next_logits(head, states), -1)
    with native.without_kernel():
        theirs = torch.log_softmax(next_logits(head, states), -1)
    assert 0 < (ours - theirs).abs().max() < 5e-5


@needs_compiler
def test_where_it_is_not_of_use(kernel: native.Kernel) -> None:
    plain = layer("linear", 32, 32)
    assert native.layer_product(plain) is not None
    with torch.enable_grad():
        assert native.layer_product(plain) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert native.layer_product(plain) is None
    assert native.layer_product(plain.double()) is None
    assert native.layer_product(nn.LayerNorm(4)) is None
    strided = nn.Linear(32, 32)
    strided.weight = nn.Parameter(torch.randn(32, 32).t())
    assert native.layer_product(strided) is None
    query, keys = torch.zeros(2, 1, 1, kernel.width - 1), torch.zeros(2, 1, 5, kernel.width - 1)
    assert native.attention_kernel(query, keys, keys) is None
    query, keys = torch.zeros(2, 1, 1, 2 * kernel.width), torch.zeros(2, 1, 5, 2 * kernel.width)
    assert native.attention_kernel(query, keys, keys) is not None
    assert native.attention_kernel(query, keys, keys[..., : kernel.width]) is None


@needs_compiler
def test_many_rows_go_through_torch(kernel: native.Kernel) -> None:
    model: PreTrainedModel = made(MODELS["gpt2"]())
    few_rows = native.FewRows(model)
    block = model.base_model.h[0].mlp.c_fc
    with few_rows(native.MOST_ROWS):
        assert "forward" in block.__dict__
    with few_rows(native.MOST_ROWS + 1):
        assert "forward" not in block.__dict__


def test_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "kernel_file", lambda: tmp_path / "absent.so")
    native._built.cache_clear()
    with torch.no_grad():
        assert native.kernel() is None
    assert not list(tmp_path.iterdir())
    native._built.cache_clear()


def test_building_without_a_compiler_or_for_another_processor_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BackendMissing, match="VSX"):
        compile_kernel("VSX", tmp_path / "kernel.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendMissing, match="compiler"):
        compile_kernel("AVX2", tmp_path / "kernel.so")
    assert not list(tmp_path.iterdir())


def test_a_run_records_which_kernel_there_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With and without it, results differ by rounding."""
    monkeypatch.setattr(native, "kernel_file", lambda: tmp_path / "native-x.so")
    assert describe(seed=0)["kernel"] is None
    (tmp_path / "native-x.so").touch()
    assert describe(seed=0)["kernel"] == "native-x.so"


def test_sampling_without_the_kernel_is_counted_where_there_is_one_to_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_built", lambda: None)
    policy = Policy(made(MODELS["gpt2"]()))
    for capability, counted in (("AVX2", 1), ("NO AVX", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        seconds_without_kernel.clear()
        sample(policy, prompts(3, 2), max_new_tokens=2, temperature=1.0, eos_id=EOS)
        assert len(seconds_without_kernel) == counted
    seconds_without_kernel.clear()


def test_a_command_that_sampled_for_long_without_it_says_so() -> None:
    said = kernel_hint(31, 100)
    assert said is not None
    assert said.startswith("31% of this command's time")
    assert "python -m preftune.models.fast.native" in said
    assert kernel_hint(30, 100) is None


def test_a_package_is_built_with_it_without_torch() -> None:
    code = "import sys; from preftune.models.fast.compiled import library as made; "
    code += "print('torch' in sys.modules, made('AVX2'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(library("AVX2"))]
