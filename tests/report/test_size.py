"""A long run's report: 10,000 metric steps, 2,000 samples, every part of the evaluation."""

import random
import time

import pytest
from synthetic import POLICIES, make_run
from synthetic_newer import add_newer_parts

from preftune.report import build
from preftune.rundir import RunDir, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("with_figures")

WORDS = [
    "the",
    "of",
    "preference",
    "to",
    "in",
    "it",
    "is",
    "that",
    "for",
    "you",
    "was",
    "response",
    "on",
    "as",
]
LIMIT, SHIPPED = 5_000_000, 3_000_000


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """2,004 samples of 60 words from six policies, 500 mistakes, 10,000 steps in each of five stages."""
    rng = random.Random(5)
    run = add_newer_parts(make_run(tmp_path_factory.mktemp("long"), steps=10_000), prompts=334)
    for policy in POLICIES:
        path = run.samples_file(policy, "gpt2")
        (row,) = read_jsonl(path)[:1]
        said = (" ".join(rng.choices(WORDS, k=60)) for _ in range(334))
        prompts = (f"\n\nHuman: {place} {' '.join(WORDS)}?\n\nAssistant:" for place in range(334))
        write_jsonl(path, [row | {"prompt": p, "response": s} for p, s in zip(prompts, said, strict=True)])
    (mistake,) = read_jsonl(run.mistakes)[:1]
    write_jsonl(run.mistakes, [mistake | {"idx": place} for place in range(500)])
    return run


def test_a_long_run_makes_a_small_page(long_run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    build(long_run)
    seconds = time.process_time() - began
    page = long_run.report_page.read_bytes()
    with capsys.disabled():
        print(f"\n10,000 steps, 2,004 samples: {len(page):,} bytes in {seconds:.1f} s of processor time")
    assert len(page) < LIMIT
    assert len(page) < SHIPPED  # and no larger than what a shipped recipe may make
    assert page.count(b'class="card"') == 334 + 500  # nothing had to be left out
    assert all(path.stat().st_size < 300_000 for path in long_run.figures.iterdir())
