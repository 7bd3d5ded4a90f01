"""What a run would take and could find, said before it begins."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

import prose
from preftune import api
from preftune.cli import main
from preftune.config import load_recipe
from preftune.config.schema import settings
from preftune.config.show import show_values
from preftune.data import Dialogue, Preference, Turn
from preftune.data.batch import real_tokens
from preftune.data.dataset import make_dataset
from preftune.data.hh import RejectedRow
from preftune.evaluation.stats import bootstrap_mean
from preftune.measure import estimate, planned
from preftune.measure.estimate import Cost
from preftune.measure.planned import fits
from preftune.records.verdict import BETTER, outcome, smallest_gain
from preftune.runs import lengths, save, train
from preftune.runs.job import Job
from preftune.runs.lengths import Lengths
from preftune.runs.plan import comparisons, power
from preftune.runs.sources import dataset_of


def test_a_gain_of_that_size_is_called_better_four_times_in_five() -> None:
    """The report's own verdict, on 400 made-up evaluations of 100 prompts: 0.8 within 3.5 standard errors."""
    random, gain = np.random.default_rng(0), smallest_gain(100, math.sqrt(2))
    assert gain == pytest.approx(0.396, abs=5e-4)  # 2.8016 · sqrt(2) / 10
    found = 0
    for _ in range(400):
        low, high = bootstrap_mean(random.normal(gain, math.sqrt(2), 100), resamples=400)[:2]
        found += outcome(low, high, 100) == BETTER
    assert found / 400 == pytest.approx(0.8, abs=3.5 * math.sqrt(0.8 * 0.2 / 400))


def test_several_policies_need_more() -> None:
    """Against scipy's t-test at a third of 5 %."""
    random, gain = np.random.default_rng(1), smallest_gain(100, 1.0, comparisons=3)
    rows = random.normal(gain, 1.0, (4000, 100))
    p = scipy_stats.ttest_1samp(rows, 0.0, axis=1).pvalue
    assert float(np.mean(p < 0.05 / 3)) == pytest.approx(0.8, abs=0.03)


def test_the_plan_says_what_can_be_found() -> None:
    config = load_recipe("tiny", ["evaluation.prompts=100"]).config
    rows = [
        Preference(prompt=Dialogue((Turn("human", f" {i}"),)), chosen=" a", rejected=" b") for i in range(100)
    ]
    many, few, fewer = (
        make_dataset({"train": [], "validation": [], "test": rows[:n]}, {}) for n in (100, 40, 9)
    )
    said = power(config, many)
    assert f"gain of {smallest_gain(100, math.sqrt(2), 5):.2f} sd" in said
    assert "evaluation.prompts=400" in said
    assert "too few for any claim" in power(load_recipe("tiny", ["evaluation.prompts=9"]).config, many)
    limited = power(config, few)  # no more prompts are found by asking for more
    assert "with 40 prompts" in limited
    assert "evaluation.prompts=100 asks for more" in limited
    assert f"gain of {smallest_gain(40, math.sqrt(2), 5):.2f} sd" in limited
    assert limited.endswith("test prompts: 160")
    assert power(config, fewer).startswith("9 prompts are too few")
    prose.compare("runs/power_and_plan: what can be found", said, limited, power(config, fewer))


@pytest.mark.parametrize(
    ("words", "family"),
    [
        ([], 5),  # base, PPO, GRPO, DPO and best-of-n against SFT
        (["stage.grpo=none"], 4),
        (["stage.ppo=none", "stage.grpo=none", "stage.rm=none"], 2),  # no score: base and DPO by gold
        (["stage.sft=none", *(f"stage.{name}.init=base" for name in ("rm", "ppo", "grpo", "dpo"))], 4),
    ],
)
def test_the_family_is_all_that_is_compared(words: list[str], family: int) -> None:
    assert comparisons(load_recipe("tiny", words).config) == family


def test_a_dry_run_shows_every_setting_with_its_origin() -> None:
    resolved = load_recipe("tiny", ["stage.ppo.kl_budget=9"])
    shown, section = {}, ""
    for line in show_values(resolved).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            continue
        name, _, rest = line.strip().partition(" ")
        shown[name if section == "run" else f"{section}.{name}"] = rest.rpartition("  ")[2]
    known = settings({name: stage.algorithm for name, stage in resolved.config.stage.items()})
    assert known.keys() - shown.keys() == {"data.template_arguments"}  # a table of the user's own
    assert (shown["stage.ppo.kl_budget"], shown["checkpoint.best"]) == ("command line", "default")


def test_the_plan_is_that_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_pairs: None
) -> None:
    costs: list[Cost] = []
    measured, trained = estimate.estimate, list[tuple[str, int, int]]()
    monkeypatch.setattr(planned, "estimate", lambda *args: costs.extend(measured(*args)) or costs)
    cut = estimate._cut_job

    def seen(taken: dict[str, Any], name: str, job: Job) -> Job:
        sizes = [real_tokens(job.batch_at(step)) for step in range(job.steps)]
        short = cut(taken, name, job)
        taken_sizes = [real_tokens(short.batch_at(step)) for step in range(short.steps)]
        del taken[name].began[:]  # these were no steps
        trained.append((name, short.steps, taken_sizes[0] - max(sizes)))
        assert job.steps <= 3 or max(abs(n - fmean(sizes)) for n in taken_sizes[1:]) <= 0.05 * fmean(sizes)
        return short

    monkeypatch.setattr(estimate, "_cut_job", seen)
    tried: list[str] = []
    monkeypatch.setattr(api, "_say_slow", tried.append)
    left_out = [f"stage.{name}=none" for name in ("grpo", "dpo")]
    own = ["stage.ppo.reward_model=none", "stage.ppo.reward_functions=preftune.judges.style:length_band"]
    assert main(["plan", "tiny", "stage.sft.rows=100", "stage.sft.epochs=3", *left_out, *own]) == 0
    assert [(cost.name, cost.steps) for cost in costs[:-1]] == [
        ("base", 60),
        ("sft", 10),
        ("rm", 4),
        ("ppo", 3),
    ]
    assert [(name, steps) for name, steps, _ in trained] == [("base", 3), ("sft", 3), ("rm", 3), ("ppo", 3)]
    assert [short for name, _, short in trained if name != "ppo"] == [0, 0, 0]  # the largest is among them
    assert costs[1].rows == 100
    assert all(cost.seconds > 0 for cost in costs)
    assert all(cost.disk > 0 for cost in costs[:-1])
    # 4 bytes of each of 2 blocks of 12 d² + 13 d, the last norm's 2 d, and vectors of tokens and positions
    weights = 4 * (2 * (12 * 32**2 + 13 * 32) + 2 * 32 + (139 + 88) * 32)
    assert [cost.trained / weights for cost in costs[:-1]] == pytest.approx([4, 4, 4, 8], rel=0.1)
    read = [cost.read / weights for cost in costs[:-1]]
    assert read == pytest.approx([0, 0, 0, 1], rel=0.1)  # PPO's reference
    assert tried[-4:] == ["trying sft", "trying rm", "trying ppo", "trying the evaluation"]
    said = capsys.readouterr().out
    assert "data: 300 train rows" in said
    assert "100 rows, 10 steps" in said
    assert "evaluation  16 prompts, 3 replies" in said
    assert "16 of best-of-n" in said
    assert costs[-1].evaluated is not None
    assert min(costs[-1].evaluated.parts.values()) > 0
    assert {*costs[-1].evaluated.parts} == {
        "3 policies",
        "pool of 16",
        "examination of the reward model",
        "numbers",
    }
    assert "too few" not in said


def test_of_rows_that_follow_the_steps_a_plan_goes_over_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts what all would take: by the second time, where the states of these rows are kept."""
    clock, gone_over = [0.0], list[tuple[int, ...]]()
    monkeypatch.setattr(estimate.time, "monotonic", lambda: clock[0])

    def work(groups: Sequence[Sequence[int]]) -> int:
        gone_over.append(tuple(map(len, groups)))
        clock[0] += 9 if len(gone_over) == 1 else 2
        return sum(map(sum, groups))

    some = estimate._SomeRows()
    assert some("rm", [range(1000), range(24)], work, trained_on=True) == sum(range(0, 1000, 63)) + sum(
        range(0, 24, 2)
    )
    assert gone_over == [(16, 12)] * 2
    assert some.seconds == {"rm": pytest.approx(2 * 1024 / 28 - 11)}
    assert some("rm", [range(320)], work, trained_on=False) == sum(range(0, 320, 10))
    assert gone_over[2:] == [(32,)]
    assert some.seconds == {"rm": pytest.approx(2 * 1024 / 28 - 11 + 2 * 9)}
    some("sft", [range(32)], work, trained_on=True)  # all of them
    assert gone_over[3:] == [(32,)]
    assert some.seconds["sft"] == 0


def test_a_plan_does_not_go_over_all_rows_after_the_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_pairs: None
) -> None:
    monkeypatch.setattr(estimate, "_GONE_OVER", 4)
    scored, losses, true_loss = list[int](), list[int](), train.response_nll
    true_scores = save._scores

    def scores(model: Any, encoder: Any, rows: Sequence[Any]) -> Any:
        scored.append(len(rows))
        return true_scores(model, encoder, rows)

    def loss(policy: Any, batches: Sequence[Any]) -> Any:
        losses.append(len(batches))
        return true_loss(policy, batches)

    monkeypatch.setattr(save, "_scores", scores)
    monkeypatch.setattr(train, "response_nll", loss)
    assert main(["plan", "tiny", *[f"stage.{name}=none" for name in ("grpo", "dpo", "ppo")]]) == 0
    assert losses == [4, 4]  # of base and SFT
    assert scored == [4, 4, 16, 16]  # normalised; reloaded


def test_rows_that_a_chat_template_refuses_have_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out when they are encoded; the plan must not end with them."""
    system = Dialogue([Turn("system", " Be kind."), Turn("human", " Hi")])
    rows = [
        Preference(prompt=prompt, chosen=" yes yes", rejected=" no")
        for prompt in (system, Dialogue([Turn("human", " Hi")]))
    ]

    def read(prompt: Dialogue) -> list[int]:
        if prompt == system:
            raise RejectedRow("template_refuses")
        return [0] * 5

    def accepts(prompt: Dialogue) -> bool:
        return prompt != system

    encoder = SimpleNamespace(prompt=read, accepts=accepts, response=str.split)
    monkeypatch.setattr(lengths, "_encoder", lambda *_: encoder)
    monkeypatch.setattr("preftune.runs.sources.make_tokenizer", lambda *_: None)
    config = load_recipe("tiny").config
    data: Any = SimpleNamespace(train=rows)
    assert lengths.mean_lengths(config, data) == Lengths(prompt=5.0, chosen=2.0, rejected=1.0)
    assert lengths.mean_lengths(config, data, rows[:1]) == lengths.longest(config)


def test_the_plan_of_upper_blocks_says_what_is_trained_and_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_pairs: None
) -> None:
    cost = Cost(name="sft", steps=4, seconds=1.0, memory_mb=400.0, disk=0)
    monkeypatch.setattr(planned, "estimate", lambda *args: [cost])
    assert main(["plan", "tiny", "model.trainable=top:1"]) == 0
    said = capsys.readouterr().out
    # Of width 32: 12 d² + 13 d in each of 2 blocks, the last norm 2 d, at most 4,000 tokens and 88 positions
    block, rest = 12 * 32**2 + 13 * 32, (4000 + 88) * 32 + 2 * 32
    assert f"0.0 M of {(2 * block + rest) / 1e6:.1f} M parameters; " in said
    for stage in ("sft", "rm", "ppo", "grpo", "dpo"):
        assert f"\n{stage}: trains the upper 1 of 2 blocks" in said
        assert re.search(rf"\n{stage}: about [1-9].* tokens through the frozen", said)


def test_what_does_not_fit_says_which_setting_to_turn() -> None:
    config = load_recipe("tiny").config
    needs = {"sft": 10.0, "ppo": 50.0}
    costs = [Cost(name=n, steps=1, seconds=1.0, memory_mb=m, disk=2.0**30) for n, m in needs.items()]
    memory, disk = fits(costs, config, memory=49.0, disk=2.0**31 - 1)
    assert "ppo needs 50 MiB of memory" in memory
    assert "49 are free" in memory
    assert "stage.ppo.microbatch_size" in memory
    assert "checkpoint.keep=1 (now 2)" in disk
    prose.compare("runs/power_and_plan: what does not fit", memory, disk)
    assert not [line for line in fits(costs, config, memory=51.0, disk=2.0**32) if "does not fit" in line]


def test_the_table_of_what_was_measured_is_that_of_the_results() -> None:
    """docs/commands.md beside benchmarks/results/plan.json, and the sums within what the page promises."""
    root, sides = Path(__file__).parents[2], ("planned", "measured")
    results = json.loads((root / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))
    page = (
        (root / "docs" / "commands.md").read_text(encoding="utf-8").partition("### Planned and measured")[2]
    )
    rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "MiB" in line
    ]
    shown = {
        name: [float(cell.split()[0].replace(",", "")) for cell in cells if cell[:1].isdigit()]
        for name, *cells in rows
    }
    for recipe, result in results.items():
        stages = {
            name: [each[side] for side in sides] for name, each in result["stages"].items() if each["planned"]
        }
        assert stages.keys() == result["stages"].keys()  # the evaluation, too
        for name, both in stages.items():
            expected = [each[unit] for unit in ("seconds", "mib") for each in both]
            assert shown[f"{recipe}, {name}"] == pytest.approx(expected, abs=0.51)
            assert both[0]["seconds"] == pytest.approx(both[1]["seconds"], rel=0.25)
            assert both[0]["mib"] == pytest.approx(both[1]["mib"], rel=0.165)  # the page tells of 16 %
        time = [sum(both[side]["seconds"] for both in stages.values()) for side in (0, 1)]
        memory = [max(both[side]["mib"] for both in stages.values()) for side in (0, 1)]
        assert shown[f"{recipe}, all"] == pytest.approx([*time, *memory], abs=0.51)
        assert time[0] == pytest.approx(time[1], rel=0.25)
        assert memory[0] == pytest.approx(memory[1], rel=0.15)


LLM = ("stage.pairs.algorithm=collect", "stage.pairs.judge=llm:some", "stage.dpo.data=pairs")


def test_a_plan_asks_no_language_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_pairs: None
) -> None:
    tried, cost = list[list[str]](), Cost(name="sft", steps=4, seconds=1.0, memory_mb=400.0, disk=0)
    words = [*LLM, "stage.pairs.llm.url=http://127.0.0.1:9/v1", "stage.pairs.llm.key_variable=NO_SUCH_KEY"]

    def trains(session: object, names: list[str]) -> None:
        tried.append(names)
        if names == ["grpo"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(estimate, "train_stages", trains)
        patch.setattr(estimate, "load_tokenizer", lambda source: None)
        patch.setattr(estimate, "chosen_lengths", lambda *_: [4])
        config = load_recipe("tiny", words).config
        with pytest.raises(KeyboardInterrupt):
            list(estimate.estimate(config, dataset_of(config.data, 0), None))
    assert tried == [[], ["sft"], ["rm"], ["ppo"], ["grpo"]]
    monkeypatch.setattr(planned, "estimate", lambda *args: [cost])
    assert main(["plan", "tiny", *words]) == 0
    said = capsys.readouterr().out
    assert "pairs: not tried" in said
    assert "judged by llm:some" in said
    assert "dpo: not tried" in said
    found = [line for line in said.splitlines() if "not tried" in line]
    prose.compare("runs/power_and_plan: stages that are not tried", *found)


def test_a_collecting_stage_replies_to_a_prompt_once() -> None:
    config = load_recipe("tiny", ["stage.pairs.algorithm=collect", "stage.pairs.judge=rm"]).config
    rows = [
        Preference(prompt=Dialogue((Turn("human", f" {i % 3}"),)), chosen=" a", rejected=" b")
        for i in range(9)
    ]
    full: Any = SimpleNamespace(config=config, training_rows=lambda stage: rows)
    assert estimate._prompts(full, "pairs") == 3


@pytest.mark.parametrize(("best", "budget", "spared"), [(0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 4)])
def test_room_is_planned_for_every_checkpoint_that_is_kept(best: int, budget: int, spared: int) -> None:
    """Of a model of 10 bytes, all trained, with two kept and one that is written: 30 bytes each."""
    words = ["checkpoint.keep=2", *["checkpoint.best=true"] * best, *["stage.ppo.kl_budget=5"] * budget]
    full: Any = SimpleNamespace(config=load_recipe("tiny", words).config)
    assert estimate._disk(full, "ppo", 10, 1) == 10 + 30 * (2 + 1 + spared)
