"""What a model computes does not depend on where its file had the weights: read, they lie as if made here.

On an AMD EPYC a row times a matrix that begins 8 bytes past a multiple of 16 differs in its last bits; other
processors need other multiples. So the addresses are compared, which is the same test on each of them.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import PLAIN, TREES, made
from preftune.audit.files import open_directory
from preftune.data.corpus import train_tokenizer
from preftune.models.aligned import ALIGNMENT, aligned
from preftune.models.load import load_causal_lm, scratch_gpt2
from preftune.models.locate import Source
from preftune.models.roles import RewardModel
from preftune.models.scalar import init_scalar_model, load_scalar_model
from tiny import causal_lm, classifier, misplaced, same_weights, sequences, state

OFFSETS = range(0, ALIGNMENT, 8)  # safetensors begins its data at a multiple of 8


def begin_at(directory: Path, offset: int) -> None:
    """Write the weights again, behind a header that ends `offset` bytes past a multiple of 64."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    for pad in range(ALIGNMENT):
        save_file({k: v.clone() for k, v in weights.items()}, file, {"format": "pt", "pad": "x" * pad})
        if data_begins(file) % ALIGNMENT == offset:
            return
    raise AssertionError(f"no header ends at {offset}")


def data_begins(file: Path) -> int:
    """8 bytes that hold the header's length, then the header."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def off_by(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` bytes past a multiple of 64."""
    room = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + offset
    copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def test_torch_makes_tensors_at_multiples_of_64_bytes() -> None:
    """What the rest of this file relies on."""
    assert all(torch.empty(size).data_ptr() % ALIGNMENT == 0 for size in (1, 3, 24, 1000, 10**6))
    assert misplaced(causal_lm(1)) == []


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_reward_model_scores_the_same_wherever_its_file_has_the_weights(
    offset: int, tmp_path: Path
) -> None:
    before = RewardModel(classifier(3))
    before.model.save_pretrained(tmp_path)
    begin_at(tmp_path, offset)
    after = RewardModel(load_scalar_model(Source(str(tmp_path))))
    assert same_weights(state(after.model), state(before.model))
    assert misplaced(after.model) == []
    for seed in range(20):
        batch = sequences(seed, 1 + seed % 6)
        assert torch.equal(after.raw_scores(batch), before.raw_scores(batch))


def tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", TREES | PLAIN)
def test_all_weights_and_buffers_are_placed_and_ties_stay_tied(family: str, tmp_path: Path) -> None:
    model = made((TREES | PLAIN)[family]())
    model.save_pretrained(tmp_path)
    begin_at(tmp_path, 8)
    read = load_causal_lm(Source(str(tmp_path)))
    assert misplaced(read) == []
    assert same_weights(state(read), state(model))
    head, embedding = read.get_output_embeddings().weight, read.get_input_embeddings().weight
    assert (head is embedding) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_the_other_ways_to_read_a_model_place_its_weights_too(tmp_path: Path) -> None:
    """A backbone that gets a head and a row, and what `preftune audit` looks at."""
    tokenizer = train_tokenizer([], 257)
    scratch_gpt2(tokenizer, layers=1, width=18, heads=2, positions=16, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    begin_at(tmp_path, 40)
    assert misplaced(init_scalar_model(Source(str(tmp_path)), tokenizer, seed=0)) == []
    assert misplaced(open_directory(tmp_path).model) == []


def test_what_shares_memory_goes_on_sharing_it() -> None:
    """One parameter under two names, two parameters over one memory, and a buffer; objects are kept, since an
    optimizer may hold them.
    """
    model, values = nn.Module(), torch.arange(12.0).view(3, 4)
    model.one = model.two = nn.Parameter(off_by(values, 8))
    model.three = nn.Parameter(model.one.detach())
    model.register_buffer("four", off_by(values[0], 4))
    held = list(model.parameters())
    assert len(misplaced(model)) == 3
    aligned(model)
    assert misplaced(model) == []
    assert list(map(id, model.parameters())) == list(map(id, held))
    assert model.one is model.two
    assert model.three.data_ptr() == model.one.data_ptr()
    assert torch.equal(model.one, values)
    assert torch.equal(model.four, values[0])
    assert model.one.requires_grad


def test_nothing_read_depends_on_its_file_any_more(tmp_path: Path) -> None:
    """A mapped file that another process overwrites would change the weights under the run."""
    causal_lm(1).save_pretrained(tmp_path)
    model, file = load_causal_lm(Source(str(tmp_path))), tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(data_begins(file))
        stream.write(b"\0" * (file.stat().st_size - data_begins(file)))
    assert same_weights(state(model), state(causal_lm(1)))
