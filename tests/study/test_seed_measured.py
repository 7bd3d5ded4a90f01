"""What the measuring of a seed asks, leaves out and depends on. Nothing is trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preftune.config import EvaluationConfig, load_recipe
from preftune.data import Dialogue, Encoder, Preference, Turn
from preftune.data.corpus import train_tokenizer
from preftune.errors import DataError
from preftune.evaluation.policy import Conditions
from preftune.measure import evaluate
from preftune.records.study import SeedRecord
from preftune.rollout.functions import RewardFunctions, load_functions
from preftune.rollout.score import Scorer
from preftune.rundir import RunDir
from preftune.study import measure, pool
from preftune.world.dataset import KINDS

PROMPTS = [
    Preference(prompt=Dialogue([Turn("human", f" Q{i}?")]), chosen=" a", rejected=" b", columns={"level": i})
    for i in range(3)
]


def by_level(prompt: str, response: str, level: int) -> float:
    return float(level)


def test_best_of_n_is_judged_by_the_row_of_its_own_prompt() -> None:
    """Policies are asked each prompt twice; best-of-n has every prompt once."""
    encoder = Encoder(train_tokenizer(PROMPTS, 257), "transcript", 36, 12)
    repeated = [row for row in PROMPTS for _ in range(2)]
    functions = RewardFunctions(
        functions=load_functions(f"{__name__}:by_level", 300), encoder=encoder, rows=repeated
    )
    judge = Scorer(reward_model=None, encoder=encoder, translate=None, functions=functions, rows=repeated)
    nothing: Any = None
    conditions = Conditions(
        prompts=repeated,
        encoder=encoder,
        scorer=judge,
        reference=nothing,
        settings=EvaluationConfig(),
        seed=0,
        device=torch.device("cpu"),
        golds={"level": judge},
        held_out=judge,
    )
    replies = encoder.sequences([(row.prompt, row.chosen) for row in PROMPTS], True)
    asked = measure._asking(conditions, PROMPTS)
    assert asked.prompts == PROMPTS
    for scorer in (asked.scorer, asked.held_out, asked.golds["level"]):
        assert scorer is not None
        assert scorer.rows == PROMPTS
        assert scorer.scores(replies, range(3)).tolist() == [0.0, 1.0, 2.0]


def test_fresh_pairs_that_are_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring one of them would end a seed that is trained."""
    config, asked, tried = load_recipe("tiny", []).config, dict[str, int](), list[int]()

    def usable(pairs: list[Preference]) -> tuple[list[Preference], dict[str, int]]:
        tried.append(len(pairs))
        return (pairs[1:] if len(tried) == 1 else []), {}  # one of the first pairs, and all others

    def pair_scores(what: str, pairs: list[Preference]) -> list[dict[str, float]]:
        asked[what] = len(pairs)
        return [{"chosen": 1.0, "rejected": float(i % 2)} for i, _ in enumerate(pairs)]

    by = SimpleNamespace(encoder=SimpleNamespace(usable=usable), pair_scores=pair_scores)
    monkeypatch.setattr(measure, "examiner", lambda *_: by)
    session: Any = SimpleNamespace(config=config)
    found = measure._fresh_accuracy(session, "rm", 6)
    assert asked == {f"{KINDS[0]} pairs": 5}
    assert found[KINDS[0]]["accuracy"]["n"] == 5
    assert found[KINDS[0]]["gaps"] == {}
    assert list(found) == [KINDS[0]]


def test_a_policy_judged_by_an_edited_function_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe("tiny", [f"evaluation.gold={__name__}:by_level"]).config
    session: Any = SimpleNamespace(
        config=config,
        run=RunDir(tmp_path),
        dataset=SimpleNamespace(test=PROMPTS),
        stage=lambda name: SimpleNamespace(key=name),
        judge="rm",
        is_world=False,
    )
    keys: list[dict[str, str]] = []
    monkeypatch.setattr(measure, "_is_measured", lambda *_: False)
    monkeypatch.setattr(measure, "_grounds", lambda *_: [])
    monkeypatch.setattr(measure, "_measure", lambda *given: keys.append(given[-1]))
    design: Any = SimpleNamespace(replies=2)
    judged_by = []
    for content in "ab":
        monkeypatch.setattr(
            evaluate, "judge_hashes", lambda judges, content=content: dict.fromkeys(judges, content)
        )
        judged_by.append(measure.measure_seed(session, design)["judged_by"])
    assert judged_by == [{"golds": {f"{__name__}:by_level": content}} for content in "ab"]
    assert not set(keys[0].values()) & set(keys[1].values())


def test_seeds_of_different_judges_are_not_pooled() -> None:
    def seed(number: int, judged_by: Any) -> Any:
        facts = SeedRecord(seconds=1.0, policies=("sft",), reference="sft", tokens={}, judged_by=judged_by)
        return SimpleNamespace(seed=number, facts=facts)

    records = {number: Path(f"seed-{number}") for number in range(3)}
    one, other = {"golds": {"m:f": "a"}}, {"golds": {"m:f": "b"}}
    words = ("judged_by", "judged by other functions or another gold", "measure it again")
    pool._refuse_differing(
        [seed(0, None), seed(1, one), seed(2, one)], records, *words
    )  # an old one does not say
    with pytest.raises(DataError, match="seed-2: judged by other functions or another gold than seed 1"):
        pool._refuse_differing([seed(0, None), seed(1, one), seed(2, other)], records, *words)
