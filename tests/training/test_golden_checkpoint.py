"""A checkpoint of preftune 0.1, as it lay on a disk: every later version reads it, or says that it does not.

Who changes the format adds a directory of the new one and keeps this one, with what its reading gives.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from preftune.algorithms import SFT
from preftune.config import OptimizerConfig, SFTConfig
from preftune.data import Sequences, pad_sequences
from preftune.errors import DataError
from preftune.hashing import sha256_file
from preftune.models.roles import Policy
from preftune.training.checkpoint import newest_step, restore
from preftune.training.learner import Learner

HOME = Path(__file__).parent / "checkpoints"
LOSSES = [1.9593077898025513, 1.8235292434692383]  # of the two steps that followed when it was written


def trainer() -> tuple[Learner, SFT]:
    """A GPT-2 of a few hundred weights on the learner, before its first step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=7, eos_token_id=7
        )
        policy = Policy(GPT2LMHeadModel(config))
    learner = Learner()
    learner.train("policy", policy, OptimizerConfig(warmup=0.0), 0.05)
    return learner, SFT(SFTConfig(), {"policy": policy}, learner)


def batch(step: int) -> Sequences:
    return pad_sequences([[1, 2], [3]], [[4, 5, 6, 7], [step % 7, 6, 7]], 7)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HOME, tmp_path / "checkpoints"))


def test_it_is_read_and_goes_on_as_it_did(directory: Path) -> None:
    """Weights and moments bit for bit; losses as on the machine that wrote it, to rounding."""
    learner, algorithm = trainer()
    with torch.no_grad():
        for parameter in learner.trained["policy"].role.model.parameters():
            parameter.fill_(0.5)
    assert restore(directory, learner, lambda text: None) == 2
    kept = load_file(HOME / "step-000002" / "policy.safetensors")
    now = dict(learner.trained["policy"].role.model.named_parameters())
    assert now.keys() == kept.keys()
    assert all(torch.equal(kept[name], now[name]) for name in kept)
    assert learner.bad_steps == 1
    losses = []
    for step in (2, 3):
        learner.set_progress(step, 4)
        losses.append(algorithm.step(batch(step))["loss"])
    assert losses == pytest.approx(LOSSES, rel=1e-5)


def test_a_format_of_another_number_is_refused_in_a_sentence(directory: Path) -> None:
    state, manifest = (directory / "step-000002" / name for name in ("state.json", "manifest.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"schema": 2}))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": sha256_file(state)}))
    assert newest_step(directory) == 2
    with pytest.raises(DataError, match=r"has schema 2; this preftune \(.*\) reads 1") as refused:
        restore(directory, trainer()[0])
    assert refused.value.hint == "resume with the preftune that wrote it"
    assert (directory / "step-000002").is_dir()


def test_it_is_small() -> None:
    """It is in every copy of the repository."""
    assert sum(file.stat().st_size for file in HOME.rglob("*") if file.is_file()) < 20_000
