"""Checkpoints: exact, complete by construction, and never trusted blindly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prose
from preftune import faults
from preftune.algorithms import SFT
from preftune.config import OptimizerConfig, SFTConfig
from preftune.errors import DataError, StorageError
from preftune.models.roles import Critic, Policy
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.state import capture
from tiny import causal_lm, classifier, same_weights, sequences, state


def made(seed: int = 1, two: bool = False) -> tuple[Learner, SFT]:
    learner, policy = Learner(), Policy(causal_lm(seed))
    learner.train("policy", policy, OptimizerConfig(), 1e-2)
    if two:
        learner.train("critic", Critic(classifier(seed)), OptimizerConfig(), 1e-2)
    return learner, SFT(SFTConfig(), {"policy": policy}, learner)


def trained(steps: int) -> tuple[Learner, SFT]:
    learner, algorithm = made()
    for i in range(steps):
        algorithm.step(sequences(i))
    return learner, algorithm


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return state(learner.trained["policy"].role.model)


def saved(directory: Path, *steps: int) -> Learner:
    """Checkpoints after each of the given numbers of steps; the learner is left at the last."""
    learner, algorithm = made()
    for i in range(max(steps)):
        algorithm.step(sequences(i))
        if i + 1 in steps:
            checkpoint.save(directory, i + 1, capture(learner), keep=9)
    return learner


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_weights_moments_and_counts_come_back_bit_for_bit(tmp_path: Path) -> None:
    learner = saved(tmp_path, 3)
    learner.trained["policy"].skipped = 2
    checkpoint.save(tmp_path, 3, capture(learner), keep=9)
    fresh, _ = made(seed=7)
    assert not same_weights(weights(fresh), weights(learner))
    assert checkpoint.restore(tmp_path, fresh) == 3
    assert same_weights(weights(fresh), weights(learner))
    old, new = (each.trained["policy"].optimizer.state_dict()["state"] for each in (learner, fresh))
    assert old.keys() == new.keys()
    assert old
    for index, moments in old.items():
        assert moments.keys() == new[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, new[index][kind]) for kind, value in moments.items())
    assert fresh.trained["policy"].skipped == 2


def test_the_next_updates_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    learner, algorithm = trained(2)
    checkpoint.save(tmp_path, 2, capture(learner), keep=1)
    fresh, again = made(seed=7)
    checkpoint.restore(tmp_path, fresh)
    for i in range(3):
        assert again.step(sequences(50 + i)) == algorithm.step(sequences(50 + i))
    assert same_weights(weights(fresh), weights(learner))


def test_every_trained_role_is_saved(tmp_path: Path) -> None:
    learner, _ = made(two=True)
    checkpoint.save(tmp_path, 1, capture(learner), keep=1)
    fresh, _ = made(seed=7, two=True)
    checkpoint.restore(tmp_path, fresh)
    for name in ("policy", "critic"):
        assert same_weights(state(fresh.trained[name].role.model), state(learner.trained[name].role.model))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    fresh, _ = made(seed=7)
    checkpoint.restore(tmp_path, fresh)
    model = fresh.trained["policy"].role.model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_newest_are_kept(tmp_path: Path) -> None:
    learner, _ = made()
    for step in (2, 4, 10, 6):
        checkpoint.save(tmp_path, step, capture(learner), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000006", "step-000010"]


def test_another_device_and_another_library_are_named_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits differ from card to card. A card that is there and not used is none."""
    learner, said = Learner(), list[str]()
    learner.train("policy", Policy(causal_lm(1)), OptimizerConfig(), 1e-3)
    checkpoint.save(tmp_path, 1, capture(learner), keep=2)
    checkpoint.restore(tmp_path, learner, said.append)
    assert said == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    checkpoint.restore(tmp_path, learner, said.append)
    assert said == []
    monkeypatch.setattr(checkpoint, "device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(checkpoint.transformers, "__version__", "9.9")
    checkpoint.restore(tmp_path, learner, said.append)
    written = json.loads((tmp_path / "step-000001" / "state.json").read_text())
    before = written["made_with"].pop("transformers")
    (line,) = said
    assert line.startswith(f"resuming with transformers {before} -> 9.9, device cpu -> Tesla T4: ")
    prose.compare("training/checkpoint: other versions and another device", line.replace(before, "1.0"))
    (tmp_path / "step-000001" / "state.json").write_text(json.dumps(written))  # of an earlier version
    checkpoint.load(tmp_path / "step-000001", learner, said.append)
    assert "transformers" not in said[1]


def test_weights_that_a_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    """A library calls them otherwise."""
    learner = saved(tmp_path, 1)
    file = tmp_path / "step-000001" / "policy.safetensors"
    tensors = load_file(file)
    tensors["of another name"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, file)
    with pytest.raises(DataError, match=r"lacks 1 of the policy's weights \(transformer.wte") as caught:
        checkpoint.load(file.parent, learner)
    assert "with the versions that wrote it" in caught.value.hint


def test_old_ones_that_cannot_be_removed_stay(tmp_path: Path) -> None:
    learner, _ = made()
    faults.arm("checkpoint.purge:enospc")
    try:
        for step in (2, 4):
            checkpoint.save(tmp_path, step, capture(learner), keep=1)
    finally:
        faults.arm("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004"]


def test_nothing_there_is_step_0(tmp_path: Path) -> None:
    learner, _ = made()
    before = weights(learner)
    assert checkpoint.restore(tmp_path / "none", learner) == 0
    (tmp_path / ".tmp-000004-123").mkdir()  # a write that was killed is no checkpoint
    assert checkpoint.restore(tmp_path, learner) == 0
    assert same_weights(weights(learner), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file", ["policy.safetensors", "policy-optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    saved(tmp_path, 2, 4)
    target = tmp_path / "step-000004" / file
    if damage == "flip":
        flip(target)
    elif damage == "truncate":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    else:
        target.unlink()
    fresh, _ = made(seed=7)
    assert checkpoint.restore(tmp_path, fresh) == 2
    assert same_weights(weights(fresh), weights(trained(2)[0]))
    assert (tmp_path / "corrupt" / "step-000004").is_dir()
    assert checkpoint.restore(tmp_path, fresh) == 2  # and again, undisturbed by what lies there


def test_a_second_accident_at_the_same_step_is_no_accident_of_ours(tmp_path: Path) -> None:
    """Both are set aside; nothing is deleted."""
    for _ in range(2):
        learner = saved(tmp_path, 2, 4)
        flip(tmp_path / "step-000004" / "policy.safetensors")
        assert checkpoint.restore(tmp_path, learner) == 2
    assert {p.name for p in (tmp_path / "corrupt").iterdir()} == {"step-000004", "step-000004-2"}


def test_without_a_valid_one_every_attempt_is_refused(tmp_path: Path) -> None:
    """Not only the first: a second attempt must not start from nothing as if nothing had been."""
    saved(tmp_path, 2, 4)
    for step in ("step-000002", "step-000004"):
        flip(tmp_path / step / "policy.safetensors")
    fresh, _ = made(seed=7)
    before = weights(fresh)
    for _ in range(2):
        with pytest.raises(DataError, match="none of 2 checkpoints") as caught:
            checkpoint.restore(tmp_path, fresh)
        assert "--restart" in caught.value.hint
    assert same_weights(weights(fresh), before)


def test_a_full_disk_is_an_error_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    learner, _ = made()
    with pytest.raises(StorageError, match="No space left"):
        checkpoint.save(tmp_path, 4, capture(learner), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]  # the old one is still there


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    directory = tmp_path / "step-000001"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert set(manifest) == {p.name for p in directory.iterdir()} - {"manifest.json"}
