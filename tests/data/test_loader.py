"""Order of training rows: complete, seeded, without state."""

import hashlib

import pytest

from preftune.data import order, rows_at
from preftune.seeding import derive_seed


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 3), (7, 4), (3, 8), (1, 2)])
def test_every_row_once_an_epoch_with_batches_across_epochs(n: int, batch_size: int) -> None:
    stream = [row for step in range(3 * n) for row in rows_at(step, batch_size, n, 0, "sft")]
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_depends_on_its_arguments_alone() -> None:
    first = rows_at(5, 4, 100, 1, "rm")
    order.cache_clear()
    [rows_at(step, 4, 100, 1, "rm") for step in range(50)]
    assert rows_at(5, 4, 100, 1, "rm") == first
    assert len({tuple(rows_at(5, 4, 100, seed, stage)) for seed in (1, 2) for stage in ("rm", "sft")}) == 4


def test_epochs_differ_and_the_stream_is_frozen() -> None:
    assert order(50, 0, "sft", 0) != order(50, 0, "sft", 1)
    assert rows_at(0, 50, 50, 0, "sft") != rows_at(1, 50, 50, 0, "sft")
    # numpy fixes Philox's raw stream, a standard fixes SHA-256. This must never change, or resume breaks.
    assert order(8, 0, "sft", 0) == (0, 3, 1, 6, 4, 7, 2, 5)


@pytest.mark.parametrize(("step", "batch_size", "n"), [(0, 4, 0), (0, 0, 4), (-1, 4, 4)])
def test_nothing_to_draw_is_an_error(step: int, batch_size: int, n: int) -> None:
    with pytest.raises(ValueError, match="no batch"):
        rows_at(step, batch_size, n, 0, "sft")


def test_seeds_depend_on_every_part_and_on_where_it_ends() -> None:
    parts = [
        (0,),
        ("0",),
        (0, 0),
        (0, "sft"),
        ("a", "bc"),
        ("ab", "c"),
        ((1, 2), 3),
        (1, (2, 3)),
        (None,),
        (),
    ]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "sft") == int(hashlib.sha256(b'[0,"sft"]').hexdigest()[:16], 16) >> 1
