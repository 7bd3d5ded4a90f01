"""Reward functions: what they are called with, how they add up, and that a failure never becomes a reward."""

import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from preftune.algorithms.on_policy import function_metrics
from preftune.data import Dialogue, Encoder, Preference, Sequences, Turn, pad_prompts
from preftune.data.corpus import train_tokenizer
from preftune.errors import DataError
from preftune.models.roles import Critic, Policy, Reference, RewardModel
from preftune.rollout.collect import collect
from preftune.rollout.functions import RewardFunctions, load_functions, masked
from preftune.rollout.score import Scorer
from tiny import causal_lm, classifier

BYTES = 257  # every byte and the end token
REPLIES = [" Yo.", " No", " It is.", " Go on.", " Hm.", " Well, yes."]
ROWS = [
    Preference(
        prompt=Dialogue((Turn("human", f" Q{i}?"),)),
        chosen=f" c{i}",
        rejected=f" r{i}",
        source="set",
        row=10 + i,
    )
    for i in range(len(REPLIES))
]
EACH = range(len(ROWS))  # the row of each prompt in `batch_of`
SEEN: list[tuple[str, str, dict[str, Any]]] = []


# Reward functions of the tests; the settings name them tests-style, "test_functions:letters".


def letters(prompt: str, response: str) -> int:
    return len(response)


def everything(prompt: str, response: str, **columns: Any) -> float:
    SEEN.append((prompt, response, columns))
    return 1.0


def some_columns(prompt: str, response: str, *, chosen: str, ended: bool) -> float:
    return len(chosen) + 10 * ended


FAILING: Callable[[], Any] = lambda: 0.0  # noqa: E731


def fails_on_go(prompt: str, response: str) -> Any:
    return FAILING() if "Go" in response else 2.0


@pytest.fixture
def encoder() -> Encoder:
    pairs = [Preference(prompt=ROWS[0].prompt, chosen=" Yo.", rejected=" No", source="", row=0)] * 3
    return Encoder(train_tokenizer(pairs, BYTES), "transcript", 36, 12)


def batch_of(encoder: Encoder, ended: bool | list[bool] = True) -> Sequences:
    return encoder.sequences([(row.prompt, reply) for row, reply in zip(ROWS, REPLIES, strict=True)], ended)


def functions(encoder: Encoder, terms: str, on_error: Any = "stop", seconds: float = 300) -> RewardFunctions:
    return RewardFunctions(
        functions=load_functions(terms, seconds), encoder=encoder, rows=ROWS, on_error=on_error
    )


def failing_with(monkeypatch: pytest.MonkeyPatch, give: Callable[[], Any]) -> None:
    monkeypatch.setitem(globals(), "FAILING", give)


def boom() -> float:
    raise RuntimeError("no such luck")


# --- calls --------------------------------------------------------------------------------------------------


def test_a_function_gets_the_prompt_the_response_and_what_is_known_of_the_row(encoder: Encoder) -> None:
    SEEN.clear()
    flags = [True, False, True, True, True, True]
    functions(encoder, "test_functions:everything").rewards(batch_of(encoder, flags), EACH)
    assert [(p, r) for p, r, _ in SEEN] == [(f"\n\nHuman: Q{i}?\n\nAssistant:", REPLIES[i]) for i in range(6)]
    expected = {"ended": False, "source": "set", "row": 11, "chosen": " c1", "rejected": " r1"}
    assert SEEN[1][2] == expected
    assert [columns["ended"] for _, _, columns in SEEN] == flags


def test_a_prompt_of_no_row_is_handed_over_as_text(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    own = functions(encoder, "test_functions:everything")
    own.rewards(batch_of(encoder))
    nothing = {"ended": True, "source": "", "row": None, "chosen": None, "rejected": None}
    assert [(f"\n\nHuman: Q{i}?\n\nAssistant:", REPLIES[i], nothing) for i in range(6)] == SEEN
    failing_with(monkeypatch, boom)
    own = functions(encoder, "test_functions:fails_on_go")
    with pytest.raises(DataError, match=r"row None: it raised RuntimeError"):
        own.rewards(batch_of(encoder))


def test_columns_are_those_of_the_row_that_a_prompt_came_from(encoder: Encoder) -> None:
    """Two replies each to rows 4 and 1; the prompts know their rows, whatever their ids are."""
    SEEN.clear()
    prompts = pad_prompts([encoder.prompt(ROWS[i].prompt) for i in (4, 1)], [1, 2], encoder.pad_id, [4, 1])
    assert prompts[1:].to("cpu").rows == (1,)
    collect(
        prompts,
        policy=Policy(causal_lm(1, BYTES)),
        reference=Reference(causal_lm(2, BYTES)),
        scorer=Scorer(
            reward_model=None,
            encoder=encoder,
            translate=None,
            functions=functions(encoder, "test_functions:everything"),
        ),
        responses_per_prompt=2,
        max_new_tokens=3,
        temperature=1.0,
        missing_eos_score=None,
        batch_size=4,
    )
    assert [columns["row"] for _, _, columns in SEEN] == [14, 14, 11, 11]


def test_a_function_sees_the_whole_prompt_although_the_model_was_given_its_end(encoder: Encoder) -> None:
    SEEN.clear()
    turns = Turn("human", " once upon a time" * 4), Turn("assistant", " Yo."), Turn("human", " Q1?")
    row = replace(ROWS[0], prompt=Dialogue(turns))
    assert encoder.prompt(row.prompt) == encoder.prompt(ROWS[1].prompt)  # cut to its last turn
    own = replace(functions(encoder, "test_functions:everything"), rows=[row])
    own.rewards(encoder.sequences([(row.prompt, REPLIES[0])], True), [0])
    assert [prompt for prompt, _, _ in SEEN] == [row.prompt.transcript()]


def test_rewards_are_float32_where_the_sequences_are(encoder: Encoder) -> None:
    """Here sequences are elsewhere than tensors made without a device, as on a GPU."""
    own, batch, usual = (
        functions(encoder, "test_functions:letters"),
        batch_of(encoder),
        torch.get_default_dtype(),
    )
    assert load_functions("test_functions:letters")[0].seconds == 300
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            scores = own.rewards(batch).total
    finally:
        torch.set_default_dtype(usual)
    assert (scores.device, scores.dtype) == (batch.ids.device, torch.float32)


def test_a_function_gets_only_the_columns_that_it_takes(encoder: Encoder) -> None:
    own = functions(encoder, "test_functions:some_columns")
    scores = own.rewards(batch_of(encoder, [False, *[True] * 5]), EACH).total
    assert scores.tolist() == [3, 13, 13, 13, 13, 13]
    assert load_functions("test_functions:letters")[0].takes == ()


def test_functions_are_weighted_and_added_to_the_reward_model(encoder: Encoder) -> None:
    own = functions(encoder, "0.5 * test_functions:letters + -1 * test_functions:some_columns")
    batch, by_hand = batch_of(encoder), torch.tensor([0.5 * len(reply) - 13 for reply in REPLIES])
    assert torch.equal(own.rewards(batch, EACH).total, by_hand)
    model = RewardModel(classifier(3, BYTES + 1), 0.3, 2.0)
    both = Scorer(reward_model=model, encoder=encoder, translate=None, batch_size=4, functions=own)
    alone = Scorer(reward_model=model, encoder=encoder, translate=None, batch_size=4)
    torch.testing.assert_close(both.scores(batch, EACH), alone.scores(batch, EACH) + by_hand)
    without = Scorer(reward_model=None, encoder=encoder, translate=None, functions=own)
    assert torch.equal(without.scores(batch, EACH), by_hand)


def test_each_function_is_reported_and_a_watched_one_enters_no_sum(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name, unweighted. One that fails where failures are masked costs no response its score."""
    failing_with(monkeypatch, boom)
    own = RewardFunctions(
        functions=load_functions("0.5 * test_functions:letters"),
        watched=load_functions("test_functions:fails_on_go + test_functions:some_columns"),
        encoder=encoder,
        rows=ROWS,
        on_error="mask",
    )
    total, each = own.rewards(batch_of(encoder), EACH)
    assert total.tolist() == [0.5 * len(reply) for reply in REPLIES]
    assert list(each) == ["letters", "fails_on_go", "some_columns"]
    assert each["letters"].tolist() == [len(reply) for reply in REPLIES]
    assert each["some_columns"].tolist() == [13] * len(REPLIES)
    assert each["fails_on_go"].isnan().tolist() == [False, False, False, True, False, False]
    with pytest.raises(DataError, match="fails_on_go, row 13"):
        replace(own, on_error="stop").rewards(batch_of(encoder), EACH)
    watching = replace(own, functions=())
    assert watching.rewards(batch_of(encoder), EACH, alone=False).total.tolist() == [0] * len(REPLIES)


def test_functions_that_end_alike_keep_their_modules(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "other_letters", SimpleNamespace(letters=lambda prompt, response: 7))
    both = functions(encoder, "test_functions:letters + other_letters:letters")
    each = both.rewards(batch_of(encoder)).by_function
    assert list(each) == ["test_functions:letters", "other_letters:letters"]
    assert each["other_letters:letters"].tolist() == [7] * len(REPLIES)


def test_means_are_over_the_responses_that_a_function_speaks_of() -> None:
    numbers = {"some": torch.tensor([1.0, math.nan, 3.0]), "none": torch.full((3,), math.nan)}
    rollout = SimpleNamespace(by_function=numbers)
    metrics = function_metrics(rollout)  # type: ignore[arg-type]
    assert metrics == {"rewards/some/mean": 2.0, "rewards/some/std": pytest.approx(math.sqrt(2))}


@pytest.mark.parametrize(
    ("give", "number"),
    [
        (lambda: True, 1.0),
        (lambda: np.float32(0.5), 0.5),
        (lambda: torch.tensor(3.0), 3.0),
        (lambda: np.bool_(True), 1.0),
        (lambda: np.array(4), 4.0),
        (lambda: torch.tensor(True), 1.0),
    ],
)
def test_whatever_is_one_number_is_a_reward(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, give: Callable[[], Any], number: float
) -> None:
    failing_with(monkeypatch, give)
    got = functions(encoder, "test_functions:fails_on_go").rewards(batch_of(encoder)).total
    assert got.tolist() == [2, 2, 2, number, 2, 2]


def test_the_worlds_gold_score_is_a_reward_function() -> None:
    from preftune.world.dataset import make_world
    from preftune.world.gold import gold
    from preftune.world.grammar import world_tokenizer

    rows = make_world(0, 6, 1, 1).train
    encoder = Encoder(world_tokenizer(), "transcript", 48, 48)
    own = RewardFunctions(
        functions=load_functions("2 * preftune.world.gold:gold"),
        encoder=encoder,
        rows=rows,
    )
    flags = [True, False] * 3
    scores = own.rewards(
        encoder.sequences([(row.prompt, row.rejected) for row in rows], flags), range(6)
    ).total
    by_rule = [2 * gold(row.prompt, row.rejected, flag) for row, flag in zip(rows, flags, strict=True)]
    assert scores.tolist() == pytest.approx(by_rule)
    assert len(set(by_rule)) > 1


# --- failures -----------------------------------------------------------------------------------------------

FAILURES: list[tuple[Callable[[], Any], str]] = [
    (boom, "it raised RuntimeError: no such luck"),
    (lambda: [1.0, 2.0], "it returned a list of length 2, not one number"),
    (lambda: torch.zeros(2), r"it returned a Tensor of shape \(2,\), not one number"),
    (lambda: "1.0", "it returned a str of length 3, not one number"),
    (lambda: None, "it gave None, as every other function did: nothing scores it"),
    (lambda: {}, "it returned a dict of length 0, not one number"),
    (lambda: 1e39, r"it returned 1e\+39, beyond float32"),
    (lambda: -(10**400), "it returned a number that is none: int too large"),
    (lambda: math.nan, "it returned nan"),
    (lambda: -math.inf, "it returned -inf"),
]


@pytest.mark.parametrize(("give", "words"), FAILURES)
def test_a_failure_names_the_function_and_the_row_and_stops(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, give: Callable[[], Any], words: str
) -> None:
    failing_with(monkeypatch, give)
    with pytest.raises(DataError, match=rf"test_functions:fails_on_go, row 13 of set: {words}") as caught:
        functions(encoder, "test_functions:fails_on_go").rewards(batch_of(encoder), EACH)
    assert caught.value.code == 65
    assert (
        "a stage that has on_reward_error" in caught.value.hint
    )  # a judge that collects and an evaluation cannot mask


@pytest.mark.parametrize(("give", "_"), [each for each in FAILURES if "None" not in each[1]])
def test_a_failure_can_mask_its_response_instead(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, give: Callable[[], Any], _: str
) -> None:
    failing_with(monkeypatch, give)
    own = functions(encoder, "test_functions:letters + test_functions:fails_on_go", "mask")
    got = own.rewards(batch_of(encoder)).total
    assert got.isnan().tolist() == [False, False, False, True, False, False]
    scores, valid = masked(got)
    assert valid is not None
    assert valid.tolist() == [True, True, True, False, True, True]
    assert scores[valid].tolist() == [len(reply) + 2 for reply in REPLIES if "Go" not in reply]
    assert masked(torch.zeros(3))[1] is None


def test_more_than_a_fifth_masked_stops(encoder: Encoder) -> None:
    own = functions(encoder, "math:log", "mask")  # no function of (prompt, response)
    with pytest.raises(
        DataError, match=r"6 of 6 responses got no reward, more than 20%; the first: .*math:log"
    ) as caught:
        own.rewards(batch_of(encoder))
    with pytest.raises(DataError) as stopped:
        functions(encoder, "math:log").rewards(batch_of(encoder))
    assert caught.value.hint != stopped.value.hint  # no advice to mask: that is what it does


@pytest.mark.parametrize(("others", "stops"), [((2, 4), True), ((0, 4), False)])
def test_the_fifth_is_of_the_responses_of_all_processes(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, others: tuple[int, int], stops: bool
) -> None:
    """One of five here; with two of four elsewhere it is a third of all."""
    failing_with(monkeypatch, boom)
    own = replace(
        functions(encoder, "test_functions:fails_on_go", "mask"), total=lambda n: n + torch.tensor(others)
    )
    with pytest.raises(DataError, match="3 of 9") if stops else nullcontext():
        own.rewards(batch_of(encoder)[torch.tensor([0, 1, 2, 3, 4])])


def test_a_fifth_masked_goes_on_and_the_first_failure_is_named(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, boom)
    batch = batch_of(encoder)
    own = functions(encoder, "test_functions:fails_on_go", "mask")
    fifth = own.rewards(batch[torch.tensor([0, 1, 2, 3, 4])]).total
    assert fifth.isnan().tolist() == [False, False, False, True, False]
    monkeypatch.setitem(globals(), "fails_on_go", lambda p, r: [][0] if "N" in r else 1 / ("o" not in r))
    with pytest.raises(DataError, match=r"3 of 6 .*the first: .*row 10 of set: it raised ZeroDivision"):
        functions(encoder, "test_functions:fails_on_go", "mask").rewards(batch, EACH)


def hang() -> float:
    try:
        time.sleep(60)
    except Exception:  # what a careless function does around a request
        return 1.0
    return 2.0


def backtrack() -> float:
    return float(re.fullmatch(r"(a+)+b", "a" * 60) is None)


@pytest.mark.parametrize("give", [hang, backtrack])
def test_a_function_that_hangs_has_failed(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, give: Callable[[], Any]
) -> None:
    """Two seconds, not less: the others, too, are measured by the clock, on a machine that may be busy."""
    failing_with(monkeypatch, give)
    before = signal.getsignal(signal.SIGALRM)
    words = r"row 13 of set: it took more than 2 s \(reward_timeout\)"
    with pytest.raises(DataError, match=words):
        functions(encoder, "test_functions:fails_on_go", seconds=2).rewards(batch_of(encoder), EACH)
    masked_one = functions(encoder, "test_functions:fails_on_go", "mask", 2).rewards(batch_of(encoder)).total
    assert masked_one.isnan().tolist() == [False, False, False, True, False, False]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_functions_are_called_in_other_threads_too(encoder: Encoder) -> None:
    """Where no time limit can be kept."""
    got: list[list[float]] = []
    own, batch = functions(encoder, "test_functions:letters"), batch_of(encoder)
    thread = threading.Thread(target=lambda: got.append(own.rewards(batch).total.tolist()))
    thread.start()
    thread.join()
    assert got == [[len(reply) for reply in REPLIES]]


def test_the_missing_eos_score_does_not_bring_a_masked_response_back(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, boom)
    own = functions(encoder, "test_functions:fails_on_go", "mask")
    scorer = Scorer(reward_model=None, encoder=encoder, translate=None, functions=own)
    got = scorer.shaped(batch_of(encoder, ended=[True, False, True, False, True, True]), -1.0).scores
    assert got.isnan().tolist() == [False, False, False, True, False, False]
    assert got[[0, 1, 2]].tolist() == [2, -1, 2]


def test_a_rollout_says_which_rows_have_a_score(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    monkeypatch.setitem(globals(), "fails_on_go", lambda p, r: math.nan if next(calls) == 4 else 1.0)
    rollout = collect(
        encoder.prompts([row.prompt for row in ROWS[:3]], seeds=[1, 2, 3]),
        policy=Policy(causal_lm(1, BYTES)),
        reference=Reference(causal_lm(2, BYTES)),
        critic=Critic(classifier(4, BYTES + 1), 0.3, 2.0),
        scorer=Scorer(
            reward_model=None,
            encoder=encoder,
            translate=None,
            functions=functions(encoder, "test_functions:fails_on_go", "mask"),
        ),
        responses_per_prompt=2,
        max_new_tokens=4,
        temperature=1.0,
        missing_eos_score=None,
        batch_size=4,
    )
    assert rollout.valid is not None
    assert rollout.valid.tolist() == [True, True, True, True, False, True]
    assert rollout.scores.tolist() == [1, 1, 1, 1, 0, 1]
    assert rollout.valid_scores.tolist() == [1] * 5
    assert rollout.learnable.response.any(1).tolist() == rollout.valid.tolist()
    assert rollout[torch.tensor([4, 0])].valid.tolist() == [False, True]  # type: ignore[union-attr]
