"""Which rows an evaluation takes: of a foreign file, for absurd replies, for a bag of words."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.config import load_recipe
from preftune.data import Dialogue, Preference, Turn
from preftune.data.dataset import make_dataset
from preftune.errors import DataError
from preftune.hashing import sha256_file
from preftune.measure import pairs, reward_models
from preftune.measure.conditions import asked_of
from preftune.models.locate import Source
from preftune.records.policy import PairsPolicy
from preftune.report.sections.other_pairs import policy_table
from preftune.rundir import RunDir


def row(number: int, reply: str = " a") -> Preference:
    return Preference(
        prompt=Dialogue([Turn("human", f" Q{number}?")]), chosen=reply, rejected=" b", row=number
    )


def session_of(path: Path, form: str = "transcript", **more: Any) -> Any:
    """A session that shuffles by turning rows round, whose template refuses the prompt of row 5."""
    config = load_recipe("tiny", [f"data.form={form}", "evaluation.prompts=3"]).config
    dataset = make_dataset({"train": [row(9)], "validation": [], "test": []}, {}, "unpaired", [row(8)])
    stub = SimpleNamespace(
        config=config,
        dataset=dataset,
        run=RunDir(path),
        base=Source("base"),
        judge=None,
        shuffled=lambda rows: [*reversed(rows)],
        encoder=lambda source: SimpleNamespace(accepts=lambda prompt: prompt[0].text != " Q5?"),
    )
    for name, value in more.items():
        setattr(stub, name, value)
    return stub


@pytest.mark.parametrize(("form", "asked"), [("transcript", [5, 4, 3]), ("chat", [4, 3, 2])])
def test_prompts_are_of_all_parts_and_none_that_the_template_refuses(
    tmp_path: Path, form: str, asked: list[int]
) -> None:
    rows = [row(i // 2, f" a{i}") for i in range(12)]  # each prompt twice
    assert [pair.row for pair in asked_of(session_of(tmp_path, form), rows)] == asked


def test_pairs_of_a_prompt_that_was_trained_on_as_undesirable_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "read_preferences", lambda *_: [row(8), row(9)])
    with pytest.raises(DataError, match=r"all 2 pairs of .* have a prompt that this run was trained on"):
        pairs.evaluate_on_pairs(session_of(tmp_path), [], tmp_path)


def test_prompts_that_the_template_refuses_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "read_preferences", lambda *_: [row(5)])
    with pytest.raises(DataError, match="the chat template of base refuses every prompt"):
        pairs.evaluate_on_pairs(session_of(tmp_path, "chat"), [], tmp_path)


def test_nothing_of_an_earlier_evaluation_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is a new one: where it fails before, the earlier one is whole."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    measured = SimpleNamespace(comparisons=[], summaries={}, best_of_n=None)
    for name, result in (
        ("read_preferences", [row(1)]), ("cache_of", None), ("measure_policies", measured), ("_opinions", {})
    ):  # fmt: skip
        monkeypatch.setattr(pairs, name, lambda *_, result=result: result)
    monkeypatch.setattr(pairs, "examinations", lambda *_, own_data: [])
    directory, file = RunDir(tmp_path).pairs("theirs"), tmp_path / "theirs.jsonl"
    directory.mkdir(parents=True)
    file.touch()
    for name in ("policy_gone.json", "reward_model_rm2_mistakes.jsonl"):
        (directory / name).write_text("{}")
    (directory / "pairs.json").write_text(json.dumps({"sha256": sha256_file(file)}))
    for step, left in (("_opinions", 3), ("write_records", 0)):
        with monkeypatch.context() as patched:
            patched.setattr(pairs, step, stop)
            with pytest.raises(KeyboardInterrupt):
                pairs.evaluate_on_pairs(session_of(tmp_path), [], file)
        assert len([*directory.iterdir()]) == left
        assert [*directory.parent.iterdir()] == [directory]


def test_a_bag_of_words_is_fitted_on_pairs_only(tmp_path: Path) -> None:
    assert reward_models.bag_of_words(session_of(tmp_path)) is None


def test_absurd_replies_are_to_different_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A ranked prompt has several pairs with one chosen reply."""
    seen: list[int] = []

    def sanity(model: Any, encoder: Any, rows: list[Preference], *_: Any) -> None:
        seen.extend(pair.row for pair in rows)
        raise KeyboardInterrupt

    usable = [row(i // 3) for i in range(9)]
    monkeypatch.setattr(reward_models, "first_encoded", lambda *_: (usable, [], {}))
    monkeypatch.setattr(reward_models, "keep_rows", lambda *_: None)
    monkeypatch.setattr(reward_models, "examine", lambda *_: {})
    monkeypatch.setattr(reward_models, "sanity_rows", sanity)
    by: Any = SimpleNamespace(
        session=session_of(tmp_path),
        stage="rm",
        model=None,
        encoder=None,
        learner=SimpleNamespace(device="cpu"),
        pair_scores=lambda *_: [],
    )
    with pytest.raises(KeyboardInterrupt):
        reward_models.examine_model(by, usable, None, own_data=False)
    assert seen == [2, 1, 0]


def test_the_table_of_the_terminal_names_whom_scores_are_against() -> None:
    """The base, where no stage imitates."""
    policies = [
        PairsPolicy.model_validate({"policy": name, "label": name}) for name in ("base", "policy_dpo")
    ]
    table = policy_table(policies, "base")
    assert table.headers[-1] == "Score − base"
    assert [row[0] for row in table.rows] == ["base", "policy_dpo"]
