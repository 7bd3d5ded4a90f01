"""What a script or a notebook calls: odd arguments are refused, and nothing of the caller's is changed."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import preftune
from preftune import api
from preftune.config import load_recipe
from preftune.errors import DataError, InputMissing, UsageError
from preftune.models.load import load_tokenizer
from preftune.models.locate import Source, cache_dir
from preftune.models.scalar import init_scalar_model
from preftune.rundir import RunDir

PROMPT = "\n\nHuman: Hi\n\nAssistant:"


@pytest.fixture(scope="module")
def judge(tiny_run: RunDir) -> Any:
    return preftune.load_reward_model(tiny_run.models / "reward_model")


@pytest.fixture(scope="module")
def policy(tiny_run: RunDir) -> Any:
    return preftune.load_policy(tiny_run.models / "policy_sft")


@pytest.mark.parametrize(
    ("prompts", "responses", "more"),
    [
        (PROMPT, [" a"] * len(PROMPT), {}),  # its characters would be prompts
        (["a", "b"], " c", {}),
        ([PROMPT], [" a", " b"], {}),
        ([PROMPT], [None], {}),
        ([PROMPT], [" a"], {"ended": [False]}),  # a list is true
    ],
)
def test_a_judge_refuses_what_is_no_list_of_pairs(
    judge: Any, prompts: Any, responses: Any, more: dict[str, Any]
) -> None:
    for score in (judge.score, judge.raw_score, judge.member_scores):
        with pytest.raises(UsageError):
            score(prompts, responses, **more)


@pytest.mark.parametrize(
    "more",
    [{"max_new_tokens": 0}, {"max_new_tokens": -1}, {"temperature": -1.0}, {"temperature": float("nan")}],
)
def test_a_policy_refuses_sizes_without_a_meaning(policy: Any, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        policy.generate([PROMPT], **more)


def test_one_text_is_no_list_of_texts(policy: Any, tiny_run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompts"):
        policy.generate(PROMPT)
    with pytest.raises(UsageError, match="prompts"):
        list(api.sample(tiny_run.path, "sft", PROMPT))
    with pytest.raises(UsageError, match="redo"):
        preftune.run("tiny", out=tmp_path / "run", redo="ppo")
    with pytest.raises(UsageError, match="overrides"):
        load_recipe("tiny", "seed=1")
    with pytest.raises(UsageError, match="key=value"):
        preftune.run("tiny", ["seed=1"], out=tmp_path / "run")  # type: ignore[arg-type]


def test_a_negative_number_of_held_out_prompts_is_refused(tiny_run: RunDir) -> None:
    with pytest.raises(UsageError):
        list(api.sample(tiny_run.path, "sft", n=-1))


def test_a_recipe_may_be_a_path(tiny_run: RunDir) -> None:
    named, typed = load_recipe(str(tiny_run.config)), load_recipe(tiny_run.config)
    assert typed == named


def test_the_wrong_kind_of_directory_is_said_to_be_that(tiny_run: RunDir) -> None:
    with pytest.raises(DataError, match="language model, not a reward model"):
        preftune.load_reward_model(tiny_run.models / "policy_sft")
    with pytest.raises(InputMissing) as error:
        preftune.load_policy(tiny_run.path)
    assert "models/" in error.value.hint


def test_a_new_reward_model_draws_nothing_from_the_callers_generator(tiny_run: RunDir) -> None:
    source = Source(str(tiny_run.models / "base"))
    before = torch.get_rng_state()
    init_scalar_model(source, load_tokenizer(source), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_name_of_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the current directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="name of a directory is empty"):
        preftune.run("tiny", out="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stderr", [None, object()])
def test_a_script_may_have_no_terminal_to_write_to(monkeypatch: pytest.MonkeyPatch, stderr: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    api._say_slow("reading")


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home, an empty variable is none, a relative place is one place; without a home, an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, place in (("~/c", "home/c"), ("", "home/.cache/preftune"), ("c", "c")):
        monkeypatch.setenv("PREFTUNE_CACHE", value)
        assert cache_dir() == tmp_path / place
    monkeypatch.delenv("PREFTUNE_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(InputMissing, match="no home directory"):
        cache_dir()


def test_a_name_that_begins_as_a_home_does_is_no_crash(tiny_run: RunDir) -> None:
    with pytest.raises(InputMissing, match="nobody-has-this-name"):
        api.evaluate(tiny_run.path, pairs="~nobody-has-this-name/x.jsonl")
