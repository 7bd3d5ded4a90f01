"""The panel of a run: it says what is in the files, whatever these hold, and is drawn on terminals only."""

import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole

import prose
import tiny
from preftune.cli import main
from preftune.config import dump_toml, load_recipe
from preftune.rundir import RunDir, append_jsonl, read_json, write_json, write_text
from preftune.runs import onlookers
from preftune.runs.console import Console, is_live
from preftune.stops import Interrupted
from preftune.watch.following import Tail, Watched
from preftune.watch.frame import duration, frame

SCORES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]


def row(step: int, **more: float) -> dict[str, Any]:
    times = {"time": 2.0 * step, "step_seconds": 2.0, "sampling_seconds": 0.5}
    tokens = {"tokens/sampled": 300.0, "tokens/trained": 1700.0, "completions/clipped_ratio": 0.25}
    return {"step": step, **times, **tokens, "objective/scores": SCORES[step - 1], **more}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """SFT is finished, PPO was killed after 12 of 40 steps."""
    place = RunDir(tmp_path / "run")
    words = ["model.base=here", *(f"stage.{name}=none" for name in ("rm", "grpo", "dpo"))]
    words += [
        "stage.ppo.reward_model=none",
        "stage.ppo.reward_functions=preftune.judges.style:politeness",
        "stage.ppo.steps=40",
    ]
    config = load_recipe("tiny", words).config
    write_text(place.config, dump_toml(config))
    write_json(place.data, {"splits": {"train": 128}})
    done = {"stage": "sft", "algorithm": "sft", "status": "finished", "seconds": 10.0, "steps": 4}
    write_json(place.stage_json("sft"), done)
    write_json(place.stage_json("ppo"), {"stage": "ppo", "algorithm": "ppo", "status": "running"})
    for step in range(1, 13):
        append_jsonl(place.metrics("ppo"), row(step))
    live = {"steps": 40, "start": "sft", "prompt": "Who?", "before": "Me.", "now": "You!", "step": 11}
    write_json(place.live("ppo"), live)
    (place.checkpoints("ppo") / "step-000010").mkdir(parents=True)
    return place


def drawn(run: RunDir, width: int = 110) -> str:
    out = RichConsole(file=io.StringIO(), width=width, force_terminal=False)
    out.print(frame(Watched(run).look(), width))
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_the_numbers_are_those_of_the_last_ten_steps(run: RunDir) -> None:
    text = drawn(run)
    # 0.2 ... 1.1: mean 0.65, sd of ten numbers 0.1 apart is 0.1 · sqrt(110 / 12)
    assert f"0.65 ± {0.1 * math.sqrt(110 / 12) / math.sqrt(10):.2g}" in text
    assert "ended    75%" in text
    assert "1,000 tokens/s   2 s a step" in text
    assert "scoring 25%, training 75%" in text
    assert "12 of 40" in text
    assert "this stage 24 s, 56 s left" in text
    assert "training 34 s, about 56 s left" in text  # no stage after this one
    assert "checkpoint of step 10, 4 s" in text
    assert [said in text for said in ("Who?", "Me.", "You!", "at 11", "SFT")] == [True] * 5
    assert "stopped: the same command resumes" in text  # nobody holds it: the process was killed
    prose.compare("watch/watch: a stage that was killed", *text.splitlines()[1:])  # the first names the run


def test_whoever_holds_it_is_seen(run: RunDir) -> None:
    with run.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "(running)" in drawn(run)


def test_stages_to_come_take_what_the_like_took(run: RunDir) -> None:
    """SFT took 10 s for 128 rows of 96 tokens; a DPO stage on as many pairs reads twice as many."""
    text = run.config.read_text()
    write_text(run.config, text + '\n[stage.dpo]\nalgorithm = "dpo"\ninit = "sft"\nrows = 128\n')
    look = Watched(run).look()
    assert look.seconds_left == pytest.approx(28 * 2.0 + 10.0 * 2)


def ensemble(run: RunDir, finished: Sequence[int], running: int | None) -> None:
    """A reward stage of three members that take 20 steps of 2 s; SFT is finished, PPO has not begun."""
    table = '\n[stage.rm]\nalgorithm = "reward"\ninit = "sft"\nrows = 128\nmembers = 3\n'
    write_text(run.config, run.config.read_text() + table)
    shutil.rmtree(run.stage_dir("ppo"))
    write_json(run.stage_json("rm"), {"stage": "rm", "algorithm": "reward", "status": "running"})
    for number in finished:
        record = {"stage": f"rm/member-{number}", "status": "finished", "seconds": 50.0, "steps": 20}
        write_json(run.stage_json(f"rm/member-{number}"), record)
        for step in range(1, 13):  # the last of them is what there is, between two members
            append_jsonl(run.metrics(f"rm/member-{number}"), {**row(step), "step": step + 8})
    if running is not None:
        name = f"rm/member-{running}"
        write_json(run.stage_json(name), {"stage": name, "status": "running"})
        write_json(run.live(name), {"steps": 20})
        (run.checkpoints(name) / "step-000004").mkdir(parents=True)
        for step in range(1, 6):
            append_jsonl(run.metrics(name), row(step))


@pytest.mark.parametrize(
    ("finished", "running", "step", "left"),
    [((), 0, 5, 15 + 20 + 20), ((0,), 1, 5, 15 + 20), ((0, 1), 2, 5, 15), ((0,), None, 20, 20 + 20)],
)
def test_the_member_under_way_is_looked_at_and_those_that_remain_are_counted(
    run: RunDir, finished: tuple[int, ...], running: int | None, step: int, left: int
) -> None:
    ensemble(run, finished, running)
    look = Watched(run).look()
    assert (look.stage, look.step, look.steps) == ("rm", step, 20)
    assert look.stage_left == pytest.approx(2.0 * left)
    assert look.checkpoint == (0 if running is None else 4)
    assert look.seconds_left is not None
    assert look.seconds_left > 2.0 * left  # and PPO
    text, number = drawn(run), len(finished) - (running is None)
    assert f"{step} of 20   reward model, member {number}" in text
    spent = 50 * number + (24 if running is None else 10)
    assert f"this stage {duration(spent)}, {duration(2 * left)} left" in text


def test_what_a_model_says_is_shown_and_does_nothing(run: RunDir) -> None:
    nasty = "[red]hot[/red] \x1b[2J\x07[link=x]" + "\n" * 50 + "\u202e" + "x" * 100_000
    height = drawn(run).count("\n")
    write_json(run.live("ppo"), {**read_json(run.live("ppo")), "now": nasty, "before": "\u3042" * 100_000})
    text = drawn(run)
    assert "[red]hot[/red] ⟨U+001B⟩[2J⟨U+0007⟩[link=x]" in text
    assert not set("\x1b\x07\u202e") & set(text)
    assert text.count("\n") <= height + 2 * 3  # two replies of three lines and one for what was cut
    assert "no picture" not in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(run: RunDir, width: int) -> None:
    assert max(map(len, drawn(run, width).splitlines())) <= width


def test_a_file_that_is_damaged_or_torn_is_passed_over(run: RunDir) -> None:
    with run.metrics("ppo").open("ab") as file:
        file.write(b'{"step": "x"}\nnot json\n{"step": 13, "time": 26.0')
    run.live("ppo").write_text("[]")
    assert Watched(run).look().step == 12


def test_only_what_is_new_is_read_and_a_cut_file_is_noticed(run: RunDir) -> None:
    tail = Tail(run.metrics("ppo"))
    tail.read()
    before = tail.rows[0]
    append_jsonl(run.metrics("ppo"), {"step": 13})
    tail.read()
    assert tail.rows[0] is before
    assert [each.step for each in tail.rows] == list(range(1, 14))
    fresh = [json.dumps({"step": step}) for step in range(1, 40)]
    write_text(run.metrics("ppo"), "".join(f"{line}\n" for line in fresh))  # longer than it was
    tail.read()
    assert [each.step for each in tail.rows] == list(range(1, 40))


def test_a_file_of_several_pieces_is_read_to_its_end(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.watch.following._BYTES", 400)
    assert run.metrics("ppo").stat().st_size > 800
    assert Watched(run).look().step == 12


def test_a_directory_that_goes_while_it_is_read_holds_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "glob", gone)
    assert Watched(run).look().checkpoint == 0


@pytest.mark.parametrize(("beta", "found"), [(0.1, True), (1.0, False)])
def test_the_doctor_reads_a_stages_own_settings(run: RunDir, beta: float, found: bool) -> None:
    """A reward of -1 is a loss of 10 nats at beta 0.1, the default, and of 1 nat at beta 1."""
    write_text(run.config, f'{run.config.read_text()}\n[stage.dpo]\nalgorithm = "dpo"\nbeta = {beta}\n')
    write_json(run.stage_json("ppo"), {"stage": "ppo", "algorithm": "ppo", "status": "finished"})
    write_json(run.stage_json("dpo"), {"stage": "dpo", "algorithm": "dpo", "status": "running"})
    for step in range(1, 13):
        append_jsonl(run.metrics("dpo"), {"step": step, "rewards/chosen": -1.0})
    kinds = [finding.kind for finding in Watched(run).look().findings]
    assert ("chosen log-probability falls" in kinds) is found


def test_the_doctor_speaks_while_it_runs(run: RunDir) -> None:
    assert "nothing found in 12 steps" in drawn(run)
    run.metrics("ppo").unlink()
    for step in range(1, 13):
        append_jsonl(run.metrics("ppo"), row(step, **{"completions/clipped_ratio": 0.05 * step}))
    text = drawn(run)
    assert "nothing found" not in text
    assert "ppo: ends are falling" in text
    assert "from 12% to 52%" in text
    (line,) = (line for line in text.splitlines() if "ends are falling" in line)
    prose.compare("watch/watch: the doctor speaks", line.strip("│ "))


def test_the_command_shows_it_once_where_nothing_can_be_drawn_over(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["watch", str(run.path)]) == 0
    assert "12 of 40" in capsys.readouterr().out
    assert main(["watch", str(tmp_path)]) == 66
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("locked", "looks"),
    [([True, True, False], 3), ([False, False, True, False], 4)],
    ids=["ends with whoever held it", "waits for one to begin"],
)
def test_the_command_ends_when_the_lock_is_released(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, locked: list[bool], looks: int
) -> None:
    """As `preftune train` leaves a run: other stages never trained, no report."""
    states = iter([*locked, KeyboardInterrupt])
    seen: list[bool] = []

    def look(watched: Watched) -> Any:
        seen.append(next(states))  # type: ignore[arg-type]
        return SimpleNamespace(finished=False, locked=seen[-1])

    monkeypatch.setattr("preftune.runs.console.is_live", lambda out: True)
    monkeypatch.setattr("preftune.watch.command._panel", lambda *_: "picture")
    monkeypatch.setattr("preftune.watch.command.time.sleep", lambda seconds: None)
    monkeypatch.setattr(Watched, "look", look)
    assert main(["watch", str(run.path)]) == 0
    assert len(seen) == looks


@pytest.mark.parametrize(
    ("terminal", "variables", "live"),
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "xterm", "CI": "true"}, False),
    ],
)
def test_where_the_panel_is_drawn(
    terminal: bool, variables: dict[str, str], live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []

    def panel(out: RichConsole) -> str:
        asked.append(out)
        return "picture"

    console = Console(panel=panel)
    console._out = RichConsole(file=io.StringIO(), force_terminal=terminal, _environ=os.environ)
    assert is_live(console._out) is live
    with console.progress("ppo", "ppo", 2) as on_step:
        on_step(1, {})
    assert bool(asked) is live


def test_durations() -> None:
    told = {0.2: "0 s", 59.4: "59 s", 61: "1:01", 3600 * 2 + 61: "2:01:01", math.inf: "?"}
    assert {seconds: duration(seconds) for seconds in told} == told


@pytest.fixture
def looked_at(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, Callable[..., None]]]:
    """A stage that is about to train a tiny policy, what goes on at each of its steps, and the policy."""
    monkeypatch.setattr(onlookers, "distinct_prompts", lambda *_: ([None], [[1, 2, 3]]))
    texts = {"prompt_text": str, "decode": lambda ids, _: str(ids)}
    encoder = SimpleNamespace(pad_id=tiny.EOS, ends=(tiny.EOS,), max_length=tiny.POSITIONS, **texts)
    policy = tiny.roles("sft")["policy"]
    learner = SimpleNamespace(is_main=True, device=torch.device("cpu"))
    job = SimpleNamespace(model=policy, encoder=encoder, learner=learner, steps=9, tokens=None)
    dataset = SimpleNamespace(validation=[None], train=[])
    session = SimpleNamespace(config=load_recipe(str(run.config)).config, run=run, dataset=dataset)
    stage = SimpleNamespace(name="ppo")
    seen: list[int] = []
    with onlookers.onlookers(session, stage, job, lambda step, _: seen.append(step)) as looks:  # type: ignore[arg-type]
        yield policy, seen, looks


def test_replies_for_onlookers_come_now_and_then_with_the_same_numbers(
    run: RunDir, looked_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen, looks = looked_at
    weights = [p.clone() for p in policy.model.parameters()]
    state = torch.random.get_rng_state()
    looks(1, {})
    first = read_json(run.live("ppo"))
    assert "now" not in first  # it is not due
    monkeypatch.setattr(onlookers.time, "monotonic", lambda: math.inf)
    looks(2, {})
    record = read_json(run.live("ppo"))
    assert record["now"] == record["before"] == first["before"] != "[]"  # nothing was trained between them
    assert (record["step"], record["steps"], record["start"], seen) == (2, 9, "sft", [1, 2])
    assert all(map(torch.equal, weights, policy.model.parameters()))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_reply_for_onlookers_ends_where_the_model_does(
    looked_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    monkeypatch.setattr(onlookers, "distinct_prompts", lambda *_: ([None], [[1] * (tiny.POSITIONS - 2)]))
    monkeypatch.setattr(onlookers, "sample", lambda *_, max_new_tokens, **__: asked.append(max_new_tokens))
    policy, *_ = looked_at
    encoder = SimpleNamespace(
        pad_id=tiny.EOS, ends=(tiny.EOS,), max_length=tiny.POSITIONS, prompt_text=str, decode=str
    )
    job: Any = SimpleNamespace(model=policy, encoder=encoder, learner=SimpleNamespace(device="cpu"))
    config = load_recipe("tiny").config
    session: Any = SimpleNamespace(config=config, dataset=SimpleNamespace(validation=[None], train=[]))
    reply = onlookers._replies(session, job)
    assert reply is not None
    with pytest.raises(AttributeError):  # the sampler in its place gives nothing
        reply("now")
    assert asked == [2]


@pytest.mark.parametrize("error", [Interrupted(2), torch.OutOfMemoryError("full")])
def test_what_goes_wrong_with_a_reply_is_passed_over(
    looked_at: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(onlookers, "sample", fails)
    monkeypatch.setattr(onlookers.time, "monotonic", lambda: math.inf)
    looked_at[2](1, {})
