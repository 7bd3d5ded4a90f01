"""`sample` in columns and `chat`, through standard input and through a pseudo-terminal."""

import io
import json
import os
import pty
import shutil
import sys
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import preftune
from gloo import begun, forkserver
from patience import PATIENCE
from preftune.chat.columns import show
from preftune.chat.talk import Talk
from preftune.cli import main
from preftune.config import DataConfig
from preftune.data import Dialogue, Turn
from preftune.data.dataset import read_training
from preftune.errors import DataError, UsageError
from preftune.measure.samples import replies
from preftune.rundir import RunDir, read_jsonl
from preftune.runs.reopen import reopen

PROMPT = "The badger eats mice and wears ribbons. What is it that the badger wears?"


@pytest.fixture(scope="module")
def run(tiny_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return RunDir(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("chat") / "run"))


def chat(run: RunDir, text: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", str(run.path), *words])


def test_a_preference_of_a_chat_is_a_row_that_stages_read(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"{PROMPT}\n/better b\nAnd what does it eat?\n/use a\n/better a\n/better z\n/nonsense\n/quit\n"
    assert chat(run, lines, monkeypatch, "--policy", "sft", "--policy", "ppo", "--policy", "grpo") == 0
    out = capsys.readouterr().out
    file = run.path / "chats" / "preferences.jsonl"
    rows = read_jsonl(file)
    assert f"{len(rows)} pairs kept in {file}" in out
    assert 1 <= len(rows) <= 2
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": PROMPT}]
        assert (row["policy_chosen"], row["judge"]) == ("ppo", "people:chat")
        assert row["policy_rejected"] in ("sft", "grpo")
        assert row["chosen"] != row["rejected"]
        for side in ("chosen", "rejected"):  # a cut reply is no lesson in ending
            _, _, rest = out.partition(f"] {row[side][0]['content']}\n")
            assert row[f"ended_{side}"] == ("cut at the limit" not in rest.partition("\n")[0])
    assert {row["chosen"][0]["content"] for row in rows} <= {piece.strip() for piece in out.splitlines()} | {
        line.partition("] ")[2].strip() for line in out.splitlines()
    }
    made = read_training(DataConfig(name=str(file)), held_out=set())
    assert [pair.rejected.strip() for pair in made.train] == [r["rejected"][0]["content"] for r in rows]
    assert "gold" in out.split("/better")[0]  # the world knows what its own prompt is worth
    assert "there is no reply 'a'" in out  # after /use nothing is left to compare
    assert "there is no '/nonsense'" in out


def test_a_chat_ends_with_its_input_and_keeps_nothing_by_itself(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.path / "chats", ignore_errors=True)
    assert chat(run, "/again\nHello there\n/again\n/new\n/help\n", monkeypatch) == 0
    out = capsys.readouterr().out
    assert "nothing was said yet" in out
    assert out.count("[a: sft]") == out.count("[b: dpo]") == 2
    assert "gold" not in out.partition("/better")[0]  # no prompt of the world's
    assert not (run.path / "chats").exists()


def test_the_score_of_a_chat_is_the_reward_models(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(run, f"{PROMPT}\n", monkeypatch, "--policy", "sft", "--temperature", "0.7") == 0
    lines = capsys.readouterr().out.splitlines()
    (place,) = [i for i, line in enumerate(lines) if "[a: sft]" in line]
    text = lines[place].partition("] ")[2]
    note = lines[place + 1]
    judge = preftune.load_reward_model(run.models / "reward_model")
    prompt = Dialogue((Turn("human", f" {PROMPT}"),)).transcript()
    score = judge.score([prompt], [f" {text}" if text else ""], ended="cut at the limit" not in note).item()
    assert f"score {score:+.2f}" in note


def test_chat_goes_on_where_a_link_would_lead_elsewhere(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.path / "chats", ignore_errors=True)
    (run.path / "chats").symlink_to(tmp_path)
    assert chat(run, f"{PROMPT}\n/better a\n", monkeypatch) == 0
    assert "is a link" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    (run.path / "chats").unlink()


@dataclass
class Conditions:
    """What replies to everything, or fails."""

    fails: bool = False
    seed: int = 0
    gold: Any = None

    def rows(self, *_: Any) -> list[dict[str, Any]]:
        if self.fails:
            raise DataError("the template refuses it")
        return [{"response": " Yes."}]


def test_no_policy_replies_to_its_own_reply_and_what_has_no_reply_was_not_said(tmp_path: Path) -> None:
    conditions: Any = Conditions()
    policies: Any = {"sft": None}
    talk = Talk(run=RunDir(tmp_path), conditions=conditions, prompts=[], policies=policies, seed=0)
    talk.say("Hi")
    talk.take(0)
    with pytest.raises(UsageError, match="nothing was said since"):
        talk.other_replies()
    conditions.fails = True
    with pytest.raises(DataError):
        talk.say("And?")
    assert [turn.role for turn in talk.turns] == ["human", "assistant"]


def test_without_a_test_row_a_sample_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    session = reopen(run.path, write=False)
    monkeypatch.setattr(session, "dataset", replace(session.dataset, test=[]))
    with pytest.raises(DataError, match="no test prompt"):
        next(replies(session, "sft", [], 0, 5))


@pytest.mark.parametrize("words", [["sample", "RUN"], ["inspect", "RUN"], ["doctor", "RUN"], ["selftest"]])
def test_where_nothing_can_be_written_is_said_before_the_work(
    run: RunDir, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run.path) if word == "RUN" else word for word in words]
    assert main([*words, "--json", str(tmp_path / "none" / "x.json")]) == 66
    assert "no such directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["--policy", "pppo"], ["--policy", "rm"], ["--temperature", "0"], ["--max-new-tokens", "0"]]
)
def test_what_cannot_be_asked_is_wrong_usage(
    run: RunDir, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(run, "", monkeypatch, *words) == 64


def test_more_new_tokens_than_positions_are_refused_by_name(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(run, "", monkeypatch, "--max-new-tokens", "2000") == 78
    assert "max_new_tokens = 2000 leaves no room for a prompt" in capsys.readouterr().err
    assert main(["sample", str(run.path), "--max-new-tokens", "2000"]) == 78
    assert "--max-new-tokens" in capsys.readouterr().err


def test_greedy_samples_of_all_policies_are_those_of_transformers(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--policy",
        "all",
        "--temperature",
        "0",
        "--max-new-tokens",
        "9",
        "--prompt",
        PROMPT,
        "--json",
        "-",
    ]
    assert main(["sample", str(run.path), *words]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == ["base", "sft", "ppo", "grpo", "dpo"]
    for row in rows[1:3]:
        directory = run.models / f"policy_{row['policy']}"
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = torch.tensor([tokenizer(row["prompt"]).input_ids])
        model = AutoModelForCausalLM.from_pretrained(directory)
        out = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=tokenizer.eos_token_id)
        said = tokenizer.decode(out[0, ids.shape[1] :]).partition("<|endoftext|>")[0]
        assert row["response"] == said


def test_samples_of_several_policies_stand_side_by_side(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run.path), "--policy", "sft", "--policy", "policy_ppo", "--prompt", "Hi"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Human: Hi"
    assert any(line.startswith("[sft]") for line in lines)
    assert any(line.startswith("[ppo]") for line in lines)


def test_columns_show_no_escape_of_a_model() -> None:
    from rich.console import Console

    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
        show(console, ["a", "b"], ["\x1b]0;owned\x07", "[bold]x[/bold]"], ["", ""])
        assert not set(out.getvalue()) & {"\x1b", "\x07"}
        assert "[bold]x[/bold]" in out.getvalue()


def on_a_terminal(name: str, words: list[str], told: Connection) -> None:
    """`preftune WORDS...` with this terminal as its standard streams."""
    for number in range(3):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ |= {"COLUMNS": "100", "TERM": "xterm"}
    told.send("open")
    sys.exit(main(words))


@pytest.mark.xdist_group("forked")
def test_on_a_terminal_replies_are_columns(tiny_run: RunDir) -> None:
    """A pseudo-terminal: two policies, their heads on one line; Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    ear, told = forkserver().Pipe(duplex=False)
    child = begun(on_a_terminal, os.ttyname(theirs), ["chat", str(tiny_run.path)], told)
    assert ear.poll(PATIENCE)
    os.close(theirs)
    os.write(ours, f"{PROMPT}\n\x04".encode())
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    child.join(PATIENCE)
    assert child.exitcode == 0
    lines = seen.decode().splitlines()
    assert any("a: sft" in line and "b: dpo" in line for line in lines)
    assert any(line.count("KL") == 2 for line in lines)
