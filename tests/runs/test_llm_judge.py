"""A language model as the judge of a stage that collects: scores, what is counted, kills, refusals."""

import gc
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prose
from gloo import begun
from llm_server import Model, serving
from made_once import small_world
from patience import wait_for
from preftune import api
from preftune.cli import main
from preftune.config import load_recipe
from preftune.config.algorithms.llm import LLMConfig
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.collect import _Collector
from preftune.runs.inputs import check_llm_judges, key_of
from preftune.runs.llm_judge import LLMJudge, llm_judge
from preftune.study.design import Request
from preftune.study.launch import run_study
from preftune.sums import write_sealed

ROWS: list[dict[str, Any]] = [
    {"row": 0, "prompt": [{"role": "user", "content": "Hi?"}], "replies": ["a", "a b c", "a b"]},
    {"row": 7, "prompt": "Plain.", "replies": ["x y", " x y ", "x"]},
]
SMALL = ("model.scratch.steps=20", "stage.sft.rows=32", "checkpoint.every=1000")
KEY = "a-key-of-no-known-form-0815"


@pytest.fixture
def model() -> Iterator[Model]:
    with serving() as model:
        yield model


def judge(model: Model, directory: Path, **more: Any) -> LLMJudge:
    config = LLMConfig(**{"url": model.url, "retries": 1, "parallel": 1, **more})
    return llm_judge("llm:judge-1b", config, directory / "answers.jsonl")


def test_a_score_is_the_share_of_comparisons_won_in_both_orders(model: Model, tmp_path: Path) -> None:
    who = judge(model, tmp_path, parallel=4)
    # 3 words beat both others, 1 word loses to both; the same text twice is a tie that nobody is asked about.
    assert who.scores(ROWS) == [[0.0, 1.0, 0.5], [0.75, 0.75, 0.0]]
    assert len(model.asked) == 6 + 2
    assert len(who.judgements(ROWS)) == 6 + 4
    assert "<conversation>\nUser: Hi?\n</conversation>" in model.questions[0]
    assert model.asked[0]["temperature"] == 0.0
    assert model.asked[0]["max_tokens"] == 512
    found = who.summary(ROWS)
    assert (found["questions"], found["no_verdict"], found["ties"]) == (8, 0, 0)
    assert found["both_orders"]["value"] == 1.0
    assert found["first_wins"]["value"] == 0.5
    assert found["tokens_in"] == sum(len(text.split()) for text in model.questions)
    assert found["cost"] is None


def test_a_judge_that_likes_a_place_decides_nothing_and_is_seen(model: Model, tmp_path: Path) -> None:
    model.judge = lambda question: "[[A]]"
    who = judge(model, tmp_path, price_in=2.0, price_out=10.0)
    assert who.scores(ROWS) == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    found = who.summary(ROWS)
    assert found["both_orders"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.4899, "n": 4}, abs=1e-4)
    assert found["first_wins"]["value"] == 1.0
    assert found["cost"] == pytest.approx((2 * found["tokens_in"] + 10 * 8) / 1e6)


def test_what_has_no_verdict_is_counted_and_gives_either_half(model: Model, tmp_path: Path) -> None:
    said = iter(["", None, "Hard to say."])
    longer, model.judge = model.judge, lambda question: next(said, longer(question))
    who = judge(model, tmp_path)
    scores = who.scores(ROWS)
    assert scores[1] == [0.75, 0.75, 0.0]
    assert sum(scores[0]) == pytest.approx(1.5)
    assert who.summary(ROWS)["no_verdict"] == 3


def test_half_an_answer_has_no_verdict(model: Model, tmp_path: Path) -> None:
    model.judge, model.ended = lambda question: "[[A]] would be right if", "length"
    who = judge(model, tmp_path)
    assert who.scores(ROWS) == [[0.5] * 3, [0.5] * 3]
    assert (found := who.summary(ROWS))["no_verdict"] == found["questions"]
    assert all(row["cut"] for row in read_jsonl(tmp_path / "answers.jsonl"))


@pytest.mark.parametrize(
    ("text", "kept"), [("A", True), ("[[A]]\n", True), ("A: since", False), ("[[A", False)]
)
def test_a_verdict_that_is_cut_right_after_it_counts(
    model: Model, tmp_path: Path, text: str, kept: bool
) -> None:
    model.judge, model.ended = lambda question: text, "length"
    who = judge(model, tmp_path)
    who.scores(ROWS)
    assert who.summary(ROWS)["no_verdict"] == (0 if kept else 8)


@pytest.mark.parametrize(("key", "why"), [("EMPTY", "fewer than 8 characters"), ("a key of words", "blanks")])
def test_a_key_that_can_be_none_is_explained(key: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match=why) as caught:
        key_of(LLMConfig(url="http://127.0.0.1:1/v1", key_variable="JUDGE_KEY"))
    assert "leave key_variable out" in caught.value.hint
    assert key not in str(caught.value)


def test_mostly_no_verdict_is_an_error_that_shows_one(model: Model, tmp_path: Path) -> None:
    model.judge = lambda question: "I cannot judge. " * 1000
    rows = [{**ROWS[0], "row": i, "prompt": f"{i}"} for i in range(4)]
    who = judge(model, tmp_path)
    who.scores(rows)
    with pytest.raises(DataError, match=r"no verdict in 24 of 24 answers; .*I cannot judge\."):
        who.check()
    assert all(len(row["answer"]) <= 2000 for row in read_jsonl(tmp_path / "answers.jsonl"))


@pytest.mark.parametrize(("main", "alone"), [(True, False), (False, False), (True, True)])
def test_other_processes_wait_a_few_questions_at_a_time(main: bool, alone: bool) -> None:
    """Five prompts of two questions, four at a time: two prompts, two, one; all at once for one alone. What
    has no verdict is counted when all have been asked about.
    """
    rows = [{"row": number, "replies": ["a", "b"]} for number in range(5)]
    happened = list[object]()

    def scores(part: list[dict[str, Any]]) -> list[list[float]]:
        happened.append([row["row"] for row in part])
        return [[1.0, 0.0]] * len(part)

    settings = SimpleNamespace(parallel=1)
    who: Any = SimpleNamespace(config=settings, scores=scores, check=lambda: happened.append("check"))
    learner: Any = SimpleNamespace(is_main=main, is_alone=alone, wait=lambda: happened.append("wait"))
    collector: Any = SimpleNamespace(config=SimpleNamespace(replies=2), name="pairs")
    _Collector._ask(collector, who, rows, learner)
    parts = [[0, 1, 2, 3, 4]] if alone else [[0, 1], [2, 3], [4]]
    expected = [each for part in parts for each in ([part, "wait"] if main else ["wait"])]
    assert happened == ([*expected[:-1], "check", "wait"] if main else expected)
    assert all(("scores" in row) == main for row in rows)


def test_what_has_been_answered_is_not_asked_again(model: Model, tmp_path: Path) -> None:
    model.faults = [None, None, None, None, (401, {}, b"{}")]
    with pytest.raises(ConfigError):
        judge(model, tmp_path).scores(ROWS)
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')
    assert judge(model, tmp_path).scores(ROWS) == [[0.0, 1.0, 0.5], [0.75, 0.75, 0.0]]
    assert Counter(Counter(model.questions).values()) == {1: 7, 2: 1}  # the one that failed
    judge(model, tmp_path).scores(ROWS)
    assert len(model.asked) == 9
    judge(model, tmp_path, temperature=1.0).scores(ROWS)  # another judge
    assert len(model.asked) == 17


def test_a_refused_question_is_noted_and_asked_again_later(model: Model, tmp_path: Path) -> None:
    model.faults = [(413, {}, b'{"error": "too long"}')]
    who = judge(model, tmp_path)
    who.scores(ROWS)
    assert who.summary(ROWS)["refused"] == 1
    assert who.judgements(ROWS)[0]["refused"] == "413: too long"
    later = judge(model, tmp_path)
    later.scores(ROWS)
    assert len(model.asked) == 9
    assert later.summary(ROWS)["refused"] == 0


@pytest.mark.parametrize("name", ["judge-1b", "", "org/judge-1b@main", "Judge-1B-2026-01-31", "judge-1b:q4"])
def test_names_of_the_same_model(model: Model, tmp_path: Path, name: str) -> None:
    model.name = name
    judge(model, tmp_path).scores(ROWS)


@pytest.mark.parametrize("name", ["judge-13b", "judge-1b-mini", "other"])
def test_another_model_is_refused(model: Model, tmp_path: Path, name: str) -> None:
    model.name = name
    with pytest.raises(ConfigError, match=rf"answers as {name}, and judge-1b was asked"):
        judge(model, tmp_path).scores(ROWS)


# --- settings -----------------------------------------------------------------------------------------------

ASKED = ("stage.pairs.algorithm=collect", "stage.pairs.judge=llm:judge-1b", "stage.dpo.data=pairs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage.pairs.llm.url=none", "llm:judge-1b is asked at llm.url"),
        ("stage.pairs.judge=rm", "llm is set and judge = rm"),
        ("stage.pairs.missing_eos_score=-1", "missing_eos_score is set, and llm:judge-1b compares: it gives"),
        ("stage.pairs.llm.url=ftp://x/v1", "url is no address of an endpoint"),
        ("stage.pairs.llm.url=http://x:99999/v1", "url is no address of an endpoint"),
        ("stage.pairs.llm.url=http://x/v1?a=b", "url is no address of an endpoint"),
        ("stage.pairs.llm.key_variable=key-0815-4711", "key_variable is the name of a variable that ends in"),
        ("stage.pairs.llm.options=[1]", "options is no JSON object"),
        ('stage.pairs.llm.options={"stream": true}', "options holds stream"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: str, message: str) -> None:
    url = "stage.pairs.llm.url=http://127.0.0.1:1/v1"
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [*ASKED, url, change])
    assert message in caught.value.message
    assert "0815" not in caught.value.message


def test_the_plan_says_how_much_will_be_asked() -> None:
    stage = load_recipe("tiny", [*ASKED, "stage.pairs.llm.url=http://127.0.0.1:1/v1"]).config.stage["pairs"]
    assert "at most 12 questions a prompt" in stage.plan()
    assert "at most 120 questions" in stage.plan([10])
    prose.compare("runs/llm_judge: the plan of a stage that asks", stage.plan(), stage.plan([10]))


def test_a_key_goes_to_other_machines_by_https_only() -> None:
    key = "stage.pairs.llm.key_variable=JUDGE_KEY"
    load_recipe("tiny", [*ASKED, key, "stage.pairs.llm.url=https://example.org/v1"])
    with pytest.raises(ConfigError, match=r"the key would go to example\.org unencrypted"):
        load_recipe("tiny", [*ASKED, key, "stage.pairs.llm.url=http://example.org/v1"])


def test_a_key_is_needed_by_what_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a run whose stage has asked all that it wanted to know."""
    words = [*ASKED, "stage.pairs.llm.url=http://127.0.0.1:1/v1", "stage.pairs.llm.key_variable=JUDGE_KEY"]
    config, run = load_recipe("tiny", words).config, RunDir(tmp_path)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(InputMissing, match="the variable JUDGE_KEY is not set"):
        check_llm_judges(config, run)
    write_sealed(run.stage_json("pairs"), {"status": "finished"})
    check_llm_judges(config, run)
    with pytest.raises(InputMissing, match="the variable JUDGE_KEY is not set"):
        check_llm_judges(config, run, anew=["pairs"])
    with pytest.raises(InputMissing, match="the variable JUDGE_KEY is not set"):
        run_study(Request(recipe="tiny", overrides=words), tmp_path / "study", seeds=1)


def test_a_missing_key_or_template_ends_it_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*ASKED, "stage.pairs.llm.url=http://127.0.0.1:1/v1"]
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(InputMissing, match=r"the variable JUDGE_KEY is not set"):
        api.run_recipe("tiny", [*words, "stage.pairs.llm.key_variable=JUDGE_KEY"], out=str(tmp_path / "run"))
    with pytest.raises(InputMissing, match=r"llm\.template: cannot read"):
        api.run_recipe("tiny", [*words, "stage.pairs.llm.template=./none.txt"], out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- a stage of a run ---------------------------------------------------------------------------------------


def words_for(model: Model) -> list[str]:
    small = ["stage.pairs.rows=6", "stage.pairs.batch_size=2", "stage.pairs.replies=2"]
    asked = [f"stage.pairs.llm.url={model.url}", "stage.pairs.llm.key_variable=JUDGE_KEY"]
    return [*SMALL, *ASKED, *small, *asked, "stage.pairs.llm.parallel=1"]


def command(words: list[str], log: Path) -> None:
    """In a process that imports nothing anew."""
    gc.freeze()
    os.environ["JUDGE_KEY"] = KEY
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    with small_world():
        main(words)


@pytest.mark.xdist_group("forked")  # where processes are forked
@pytest.mark.usefixtures("small_data")
def test_killed_in_the_middle_it_asks_nothing_twice_and_writes_the_key_nowhere(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    words = words_for(model)
    whole = api.run_recipe("tiny", words, out=str(tmp_path / "whole"), until="pairs")
    count, url = len(model.asked), model.url
    assert all(each["Authorization"] == f"Bearer {KEY}" for each in model.headers)
    killed = RunDir(shutil.copytree(whole.path, tmp_path / "killed"))
    shutil.rmtree(killed.collected("pairs"))
    shutil.rmtree(killed.stage_dir("pairs"))
    model.asked.clear()
    model.hold, model.hold_after = threading.Event(), count // 2
    log = tmp_path / "log"
    child = begun(command, ["train", "tiny", "pairs", *words, "--out", str(killed.path)], log)
    try:
        assert model.held.wait(300), log.read_text()
        written = killed.answers("pairs")  # one thread asks, another writes
        wait_for(lambda: written.is_file() and len(written.read_bytes().splitlines()) == count // 2)
    finally:
        child.kill()
        child.join()
    model.hold.set()
    model.hold = None
    again = api.run_recipe("tiny", words, out=str(killed.path), until="pairs")
    assert Counter(Counter(model.questions).values()) == {1: count - 1, 2: 1}  # one was under way
    for name in ("replies.jsonl", "preferences.jsonl", "judgements.jsonl", "template.txt", "preftune.json"):
        ours, theirs = (each.collected("pairs") / name for each in (whole, again))
        assert ours.read_bytes() == theirs.read_bytes()
    facts = read_json(again.stage_json("pairs"))["collected"]
    assert facts["judge"] == "llm:judge-1b"
    assert (
        facts["llm"]["questions"] == count == len(read_jsonl(again.collected("pairs") / "judgements.jsonl"))
    )
    assert url in again.config.read_text(encoding="utf-8")
    files = [file for each in (whole, again) for file in each.path.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in [*files, log] if KEY.encode() in file.read_bytes()]
