"""States of rows on disk: what is read is what was written, or it is computed again."""

import itertools
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import prose
from families import TREES, made
from preftune.cli import main
from preftune.data import Sequences
from preftune.models import kept
from preftune.models.fast.support import plain_layout, rows_below
from preftune.models.fast.trunk import branch_of
from preftune.models.kept import KeptStates
from preftune.models.roles import Policy, Reference, RewardModel
from preftune.models.trunk import keep_on_disk, share_trunk
from tiny import passes, sequences

FLOAT = np.dtype(np.float32)
ROWS = {bytes([i]) * 16: np.random.default_rng(i).random((3 + i, 4), np.float32) for i in range(5)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    return tmp_path


def filled(directory: Path, limit: int = 1 << 20) -> KeptStates:
    made_of = KeptStates(directory, 4, FLOAT, limit)
    for key, states in ROWS.items():
        made_of.add(key, states)
    return made_of


def there(states: KeptStates) -> list[bytes]:
    """Keys whose rows come back; each as it was written."""
    found = {key: states.get(key) for key in ROWS}
    for key, row in found.items():
        assert row is None or np.array_equal(row, ROWS[key])
    return [key for key, row in found.items() if row is not None]


def test_rows_come_back_for_another_process_too(tmp_path: Path) -> None:
    open_before = KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)
    assert there(open_before) == []
    assert there(filled(tmp_path / "a")) == list(ROWS)
    assert there(open_before) == there(KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)) == list(ROWS)


@pytest.mark.parametrize("place", [0, 50, 70, 111, -1])
@pytest.mark.parametrize("name", ["states.bin", "rows.idx"])
def test_a_flipped_bit_costs_one_row_which_is_written_again(tmp_path: Path, name: str, place: int) -> None:
    filled(tmp_path / "a")
    file = tmp_path / "a" / name
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    states = KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)
    lost = set(ROWS) - set(there(states))
    assert len(lost) == 1
    for key in lost:
        states.add(key, ROWS[key])
    assert there(KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)) == list(ROWS)


@pytest.mark.parametrize("cut", [1, 20, 47, 49])
def test_what_a_kill_has_left_half_written_is_passed_over(tmp_path: Path, cut: int) -> None:
    """In the index: the last record, or a part of the one before; rows written after it are found."""
    filled(tmp_path / "a")
    index = tmp_path / "a" / "rows.idx"
    index.write_bytes(index.read_bytes()[:-cut])
    states = KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)
    for key in set(ROWS) - set(there(states)):
        states.add(key, ROWS[key])
    assert there(states) == there(KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)) == list(ROWS)


def test_files_stay_within_their_bound(tmp_path: Path) -> None:
    states = filled(tmp_path / "a", limit=(3 + 4) * 4 * 4)
    assert there(states) == list(ROWS)[:2]
    assert (tmp_path / "a" / "states.bin").stat().st_size == (3 + 4) * 4 * 4


def test_a_directory_that_another_process_removes_ends_nothing(tmp_path: Path) -> None:
    states = KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)
    shutil.rmtree(tmp_path / "a")
    assert there(states) == []
    with pytest.raises(OSError, match="lock"):
        states.add(*next(iter(ROWS.items())))


def test_rows_of_a_directory_that_was_made_again_are_compared_again(tmp_path: Path) -> None:
    """Where a row lay in the first file there is another one in the second."""
    states = filled(tmp_path / "a")
    assert there(states) == list(ROWS)
    shutil.rmtree(tmp_path / "a")
    other = KeptStates(tmp_path / "a", 4, FLOAT, 1 << 20)
    for i in range(5, 15):
        other.add(bytes([i]) * 16, np.full((5, 4), i, np.float32))
    assert states.get(bytes([14]) * 16) is not None  # in the part of the index that was not read
    assert there(states) == []


def test_a_directory_that_is_full_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    policy = shared(limit=40 * 16 * 4)[0]  # 40 tokens, 16 wide
    for seed in (1, 2, 3):
        policy.logprobs(sequences(seed, 6))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "is full" in line)
    prose.compare("models/kept: a directory that is full", re.sub("/[^ ]+", "DIR", line))


def test_the_command_says_how_much_there_is_and_removes_it(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        filled(kept.states_dir() / name)
    assert main(["cache"]) == 0
    assert str(kept.states_dir() / "a") in capsys.readouterr().out
    filled(kept.states_dir() / "a")  # used after b
    assert [folder.name for folder in kept.sizes()] == ["b", "a"]
    assert kept.empty(to=sum(kept.sizes().values())) == 0
    assert kept.empty(to=sum(kept.sizes().values()) - 1) > 0  # b goes
    assert [folder.name for folder in kept.sizes()] == ["a"]
    assert kept.empty(to=0, keep=kept.states_dir() / "a") == 0
    assert main(["cache", "--empty"]) == 0
    assert kept.sizes() == {}


def shared(dtype: Any = "float32", limit: int = 1 << 20) -> tuple[Policy, Reference, RewardModel]:
    policy, reference = Policy(made(TREES["gpt2"]())), Reference(made(TREES["gpt2"]()))
    judge = RewardModel(made(TREES["gpt2"](), AutoModelForSequenceClassification))
    judge.model.base_model.load_state_dict(policy.model.base_model.state_dict())
    for role in (policy, reference, judge):
        share_trunk(role.model, 1)
        keep_on_disk(role.model, 40, limit, dtype, print)
    return policy, reference, judge


def test_rows_are_computed_once_in_all_stages_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, plain = sequences(3, 5), Policy(made(TREES["gpt2"]())).logprobs(sequences(3, 5))
    policy, reference, judge = shared()
    seen = [passes(role.model, monkeypatch) for role in (policy, reference, judge)]
    found = policy.logprobs(batch)
    assert sorted(seen[0]) == sorted(batch.attention.sum(1).tolist())  # each row alone
    assert (found - plain).abs().max() < 1e-5
    for again in (reference.logprobs(batch), policy.logprobs(batch), judge.raw_scores(batch)):
        assert again.isfinite().all()
    again_all = shared()  # as another run
    seen += [passes(role.model, monkeypatch) for role in again_all]
    assert torch.equal(again_all[0].logprobs(batch), found)
    assert [len(each) for each in seen] == [5, 0, 0, 0, 0, 0]


def test_a_rows_states_do_not_depend_on_the_rows_beside_it() -> None:
    """Bit for bit: what a resumed run finds on disk is what it would compute."""
    batch = sequences(3, 6)
    trunk = shared()[0]
    policy = trunk.model
    branch = branch_of(policy)
    assert branch is not None
    assert branch.trunk.disk is not None
    trunk.logprobs(batch[torch.tensor([4, 1, 2])])
    mixed = trunk.logprobs(batch[torch.tensor([1, 4])])
    kept.empty()
    fresh = shared()[0].logprobs(batch[torch.tensor([1, 4])])
    assert torch.equal(fresh, mixed)


@pytest.mark.parametrize("by_tree", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_states_do_not_depend_on_the_number_of_threads(by_tree: bool, dtype: torch.dtype) -> None:
    """Nor on rows that go through at the same time."""
    batch, found, before = sequences(3, 12), list[list[torch.Tensor]](), torch.get_num_threads()
    for threads in (1, 3):
        policy = shared()[0]
        branch = branch_of(policy.model)
        assert branch is not None
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            nullcontext() if by_tree else plain_layout(),
        ):
            torch.set_num_threads(threads)
            seen = list[int]()
            hook = branch.cut.blocks[0].register_forward_pre_hook(
                lambda *_, seen=seen: seen.append(torch.get_num_threads())
            )
            try:
                rows = rows_below(policy.model, branch.cut, batch.ids, batch.attention, alone=True)
                assert torch.get_num_threads() == threads
            finally:
                torch.set_num_threads(before)
            hook.remove()
            assert seen == [1] * 12
        found.append([row.states[row.state_index] for row in rows])
        assert not any(block._forward_pre_hooks for block in branch.cut.blocks)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_an_error_in_one_of_several_passes_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, before, policy = sequences(3, 12), torch.get_num_threads(), shared()[0].model
    branch, usual = branch_of(policy), policy.config._attn_implementation
    assert branch is not None
    table = policy.get_input_embeddings()
    numbers = itertools.count()

    def fails_once(ids: torch.Tensor) -> torch.Tensor:
        if next(numbers) == 1:
            raise MemoryError
        return torch.nn.functional.embedding(ids, table.weight)

    monkeypatch.setattr(table, "forward", fails_once)
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError):
            rows_below(policy, branch.cut, batch.ids, batch.attention, alone=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert policy.config._attn_implementation == usual
    assert not any(block._forward_pre_hooks for block in branch.cut.blocks)
    assert len(rows_below(policy, branch.cut, batch.ids, batch.attention, alone=True)) == 12


def test_bf16_rounds_by_little_and_takes_half(cache: Path) -> None:
    batch: Sequences = sequences(3, 6)
    exact = shared()[0].logprobs(batch).detach()
    whole = sum(file.stat().st_size for file in cache.glob("states/*/states.bin"))
    kept.empty()
    first = shared("bf16")[0]
    rounded = first.logprobs(batch).detach()
    assert sum(file.stat().st_size for file in cache.glob("states/*/states.bin")) == whole / 2
    assert 1e-7 < (rounded - exact).abs().max() < 0.1
    assert torch.equal(first.logprobs(batch), rounded)  # what was computed is what is read


def test_rows_that_would_not_fit_are_not_kept(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    policy = shared(limit=100)[0]
    assert "computed in every pass" in capsys.readouterr().out
    policy.logprobs(sequences(1))
    assert not list(cache.glob("states/*"))


def test_what_a_trunk_holds_already_counts_towards_the_bound_of_all(cache: Path) -> None:
    model = made(TREES["llama"]())
    share_trunk(model, 1)
    say = print
    branch = branch_of(model)
    assert branch is not None
    keep_on_disk(model, 10, 10_000, "float32", say)
    own = branch.trunk.disk
    assert own is not None
    own.add(b"1" * 16, np.zeros((140, 16), np.float32))  # 8,960 bytes
    other = KeptStates(own.directory.parent / "other", 16, FLOAT, 10_000)
    other.add(b"2" * 16, np.zeros((60, 16), np.float32))  # 3,840: together more than 10,000
    branch.trunk.disk = None
    keep_on_disk(model, 10, 10_000, "float32", say)  # needs 640
    assert own.directory.is_dir()
    assert not other.directory.exists()


def test_a_full_disk_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = shared()[0]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KeptStates, "add", full)
    policy.logprobs(sequences(1))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "No space left" in line)
    prose.compare("models/kept: a full disk", re.sub("/[^ ]+", "DIR", line))
