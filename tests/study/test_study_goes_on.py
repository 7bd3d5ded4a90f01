"""A study that goes on: nothing twice, sweeps, files without gold, the command."""

import math
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_helpers import POLICIES, SEEDS, SMALL, study_json, wanted, without_grpo

import prose
from made_once import figures
from preftune import cli
from preftune.config import RewardConfig, RunConfig, load_recipe
from preftune.errors import ConfigError, PreftuneError, UsageError
from preftune.rundir import read_json, write_jsonl
from preftune.runs.console import Console
from preftune.study import launch, measure
from preftune.study import seed as one_seed
from preftune.study.design import Design, Request, load_design, make_design, save_design
from preftune.study.launch import run_study
from preftune.study.page import _second_model_words
from preftune.study.tasks import Task
from preftune.sums import write_sealed

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the study and goes on with it


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# --- not twice ----------------------------------------------------------------------------------------------


def test_a_finished_seed_is_not_run_again(
    two_seeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    study_of: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "again"
    shutil.copytree(two_seeds, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("seed-*/**/*") if p.is_file()}

    def not_again(*_: Any) -> None:
        raise AssertionError("a finished seed was run again")

    monkeypatch.setattr(one_seed, "checked_data", not_again)
    again = study_of(out, seeds=2, first_seed=3)
    assert again["policies"] == study_json(two_seeds)["policies"]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("seed-*/**/*") if p.is_file()} == before
    assert "seed 3 already finished" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="run again"):  # one seed more is work
        study_of(out, seeds=3, first_seed=3)


def test_an_interrupted_study_resumes(
    two_seeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    study_of: Callable[..., dict[str, Any]],
) -> None:
    """Killed in seed 4, after SFT and before the measurement of GRPO: only what is missing is made. Killed
    once more while the last, best-of-n, is measured: GRPO is not measured again.
    """
    out = tmp_path / "resumed"
    shutil.copytree(two_seeds, out)
    without_grpo(out, 4)
    (out / "seed-4/study/best_of_n.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_best_of_n", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study_of(out, seeds=2, first_seed=3)
    kept = ["models/policy_sft/model.safetensors", "study/ppo.json", "study/grpo.json"]
    before = [(out / "seed-4" / name).stat().st_mtime_ns for name in kept]
    resumed = study_of(out, seeds=2, first_seed=3)
    assert [(out / "seed-4" / name).stat().st_mtime_ns for name in kept] == before
    assert resumed["policies"] == study_json(two_seeds)["policies"]


def test_a_seed_goes_on_with_the_data_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hub the commit on record, not today's; where no run is here, the one in the mirror."""
    from preftune.runs import sources

    commits: list[str | None] = []

    def asked(config: Any, seed: int, commit: str | None = None) -> None:
        commits.append(commit)
        interrupt()

    monkeypatch.setattr(sources, "dataset_of", asked)
    for name, file in (("own", "own/seed-0/data.json"), ("other", "mirror/seed-0/commits.json")):
        out, mirror = tmp_path / name, tmp_path / "mirror"
        config = load_recipe("hh-scratch", ["data.name=me/pairs"]).config
        nothing: Any = None
        save_design(make_design(Request("hh-scratch", tokens=0), config, nothing, nothing), out)
        content = {"name": "me/pairs", "commit": "a"} if name == "own" else {"data me/pairs": "b"}
        write_sealed(tmp_path / file, content)
        with pytest.raises(KeyboardInterrupt):
            one_seed.run_seed(Task(out=out, seed=0, mirror=mirror))
    assert commits == ["a", "b"]


def test_two_jobs_run_a_last_seed_as_the_others(
    two_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread, on which numbers may hang."""
    threads: list[int] = []
    monkeypatch.setattr(launch, "carry_out", lambda tasks, *_, **__: threads.extend(t.threads for t in tasks))
    launch._run(tmp_path, [3], load_design(two_seeds), 2, False, launch.Placement(), Console(quiet=True))
    assert threads == [1]


def test_the_command_of_the_page_is_one_for_a_shell() -> None:
    asked = Request("my recipe.toml", ("data.name=my pairs",), sweep="stage.ppo.steps=1; stage.dpo.rows=2")
    words = shlex.split(launch._command(asked, [3, 4], Path("my study"), False, None))
    assert words[:3] == ["preftune", "study", "my recipe.toml"]
    assert {asked.sweep, "data.name=my pairs", "out=my study"} < set(words)


def test_a_study_of_other_settings_is_refused(
    two_seeds: Path, tmp_path: Path, study_of: Callable[..., dict[str, Any]]
) -> None:
    out = tmp_path / "other"
    shutil.copytree(two_seeds, out)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_study(
            Request("tiny", (*SMALL, "stage.sft.learning_rate=0.01"), fresh_pairs=20, replies=2),
            out,
            seeds=1,
            first_seed=3,
            reports=False,
        )


def test_seeds_of_a_study_are_not_set_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sets the seeds itself"):
        run_study(Request("tiny", ("seed=5",)), tmp_path, seeds=1)
    with pytest.raises(UsageError, match="1 or more"):
        run_study(Request("tiny"), tmp_path, seeds=0)
    with pytest.raises(UsageError, match="--tokens 0 or more"):
        run_study(Request("tiny", tokens=-1), tmp_path, seeds=1)
    with pytest.raises(ConfigError, match="has no sft stage"):
        run_study(
            Request(
                "tiny",
                (
                    "stage.sft=none",
                    *(f"stage.{n}=none" for n in ("rm", "ppo", "grpo", "dpo")),
                    "stage.x.algorithm=reward",
                    "stage.x.init=base",
                ),
            ),
            tmp_path,
            seeds=1,
        )


# --- sweep --------------------------------------------------------------------------------------------------


def test_a_sweep_runs_its_own_stages_only(
    two_seeds: Path, tmp_path: Path, study_of: Callable[..., dict[str, Any]]
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(two_seeds, out)
    ppo = out / "seed-3" / "models" / "policy_ppo" / "model.safetensors"
    measured = out / "seed-3" / "study" / "ppo.json"
    before = [path.stat().st_mtime_ns for path in (ppo, measured)]
    with figures(drawn=True):
        study = study_of(out, seeds=1, first_seed=3, sweep="stage.ppo.kl_coef=0.0,0.05,1.0")
    assert [path.stat().st_mtime_ns for path in (ppo, measured)] == before
    sweep = study["sweep"]
    assert [(p["value"], p["stage"]) for p in sweep["points"]] == [
        ("0.0", "ppo-kl_coef-0_0"), ("0.05", "ppo"), ("1.0", "ppo-kl_coef-1_0"),
    ]  # fmt: skip
    config = load_recipe(str(out / "study.toml")).config
    assert config.stage["ppo-kl_coef-1_0"].kl_coef == 1.0  # type: ignore[union-attr]
    for point in sweep["points"]:
        assert point["sqrt_kl"] == pytest.approx(math.sqrt(point["kl"]))
    assert set(sweep["laws"]) == {"rl_gold", "rl_score", "bon_gold", "bon_score"}
    assert sweep["laws"]["bon_score"]["law"] == "d (alpha - beta d)"
    page = (out / "STUDY.md").read_text(encoding="utf-8")
    swept = page.partition("\n## Sweep of stage.ppo.kl_coef\n")[2].partition("\n## ")[0]
    assert "None for RL: 3 points" in swept
    said = [line for line in swept.splitlines() if "None for RL" in line]
    prose.compare("study/study_goes_on: a sweep of three points has no law", *said)
    assert (out / "figures" / "sweep.svg").is_file()
    assert "PPO (kl_coef swept)" in (out / "figures" / "frontier.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        *("kl_coef=1", "stage.nobody.kl_coef=1", "stage.ppo.kl_coef=", "stage.rm.rows=5"),
        "stage.ppo.kl_coef=0.1; stage.ppo.kl_coef=0.2",  # twice
        "stage.ppo.kl_coef=1e-1,1e+1",  # would be one stage
    ],
)
def test_what_cannot_be_swept_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        run_study(Request("tiny", sweep=text), tmp_path, seeds=1)


# --- text without gold, and the command ---------------------------------------------------------------------


@pytest.fixture
def of_a_file(tmp_path: Path) -> tuple[str, ...]:
    """Settings on the world's own pairs as a file: then nobody knows their gold score."""
    from preftune.world.dataset import make_world

    world = make_world(0, 160, 1, 1)
    file = tmp_path / "pairs.jsonl"
    rows = [
        {s: pair.prompt.transcript() + getattr(pair, s) for s in ("chosen", "rejected")}
        for pair in world.train
    ]
    write_jsonl(file, rows)
    small = [word for word in SMALL if not word.startswith("data.pairs=")]  # the world's
    return (*small, f"data.name={file}", "data.held_out=0.2", "model.scratch.vocab_size=300",
            "data.max_prompt_length=60", "data.max_response_length=28")  # fmt: skip


def characters(prompt: str, response: str) -> float:
    """A judge that no training sees."""
    return float(len(response))


def test_on_a_file_the_named_judge_is_gold_and_no_second_reward_model_is_trained(
    tmp_path: Path, of_a_file: tuple[str, ...]
) -> None:
    """DPO has pairs of its own besides."""
    kept = [word for word in of_a_file if not word.startswith(("stage.ppo.", "stage.grpo."))]
    gold = f"{__name__}:characters"
    (tmp_path / "own.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().partition("\n")[2])
    settings = (*kept, f"evaluation.gold={gold}", "stage.ppo=none", "stage.grpo=none",
                f"stage.dpo.data={tmp_path / 'own.jsonl'}")  # fmt: skip
    asked = Request("tiny", settings, replies=2)
    study = read_json(run_study(asked, tmp_path / "out", seeds=1, reports=False))
    assert study["gold"] == gold
    content = read_json(tmp_path / "out/seed-0/study/seed.json")["content_sha256"]
    assert set(content) == {"train", "validation", "test", "others"}
    assert "gold_rm" not in load_recipe(str(tmp_path / "out" / "study.toml")).config.stage
    own, sft = (read_json(tmp_path / f"out/seed-0/study/{name}.json") for name in ("dpo", "sft"))
    lengths = np.array([len(sample["response"]) for sample in own["samples"]["test"]]).reshape(-1, 2).mean(1)
    assert own["sets"]["test"]["gold"][: len(lengths)] == pytest.approx(lengths.tolist())
    gains = np.array(own["sets"]["test"]["gold"]) - np.array(sft["sets"]["test"]["gold"])
    assert study["policies"]["dpo"]["gold_gain"] == pytest.approx(gains.mean(), abs=1e-6)
    assert gold in (tmp_path / "out" / "STUDY.md").read_text(encoding="utf-8")


def test_without_gold_a_second_reward_model_stands_in(tmp_path: Path, of_a_file: tuple[str, ...]) -> None:
    settings = of_a_file
    study = read_json(run_study(Request("tiny", settings), tmp_path / "out", seeds=1, reports=False))
    assert study["gold"] == "second reward model"
    assert study["prompt_sets"] == ["test"]
    assert study["reward_model"] is None
    assert isinstance(study["policies"]["ppo"]["gold_gain"], float)
    assert "ceiling" not in study["policies"]
    stages = load_recipe(str(tmp_path / "out" / "study.toml")).config.stage
    judges = {name: stage.part for name, stage in stages.items() if isinstance(stage, RewardConfig)}
    assert judges == {"rm": "first", "gold_rm": "second"}
    assert study["gold_apart"] is True
    page = (tmp_path / "out" / "STUDY.md").read_text(encoding="utf-8")
    assert "trained on pairs of other" in " ".join(page.split())
    own = read_json(tmp_path / "out" / "seed-0" / "study" / "ppo.json")["sets"]["test"]
    assert own["gold"] != own["score"]


def test_a_recipe_with_a_second_judge_of_its_own_gets_no_other() -> None:
    config = load_recipe("hh-scratch", ["data.name=x"]).config
    nothing: Any = None  # neither rows nor lengths are looked at
    design = make_design(Request("hh-scratch", tokens=0), config, nothing, nothing)
    assert design.config == config
    assert design.gold == "second reward model"
    assert design.gold_apart
    same = {n: s.on_part("all") if s.scores else s for n, s in config.stage.items()}
    shared = replace(design, config=config.model_copy(update={"stage": same}))
    assert shared.gold_apart is None  # the settings do not say
    pages = {
        apart: " ".join(_second_model_words({"gold": shared.gold, "gold_apart": apart}))
        for apart in (True, False, None)
    }
    assert "other prompts" in pages[True]
    assert "shares prompts with" in pages[False]
    assert "not known whether" in pages[None]
    said = [f"{apart}: {words.strip()}" for apart, words in pages.items()]
    prose.compare("study/study_goes_on: a second reward model as gold, apart or not", *said)
    assert pages[None] == " ".join(_second_model_words({"gold": shared.gold}))  # of an older study


def test_a_second_judge_that_a_policy_learns_from_is_no_gold() -> None:
    taught = ["data.name=x", "stage.grpo.reward_model=rm2"]
    config = load_recipe("hh-scratch", taught).config
    nothing: Any = None
    with pytest.raises(ConfigError, match=r"some stage learns \(rm, rm2\)"):
        make_design(Request("hh-scratch", tuple(taught), tokens=0), config, nothing, nothing)


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ([], True),
        (["evaluation.gold=preftune.judges.style:sentiment"], False),
        (["stage.rm3.algorithm=reward"], False),
    ],
    ids=["no gold", "gold", "another witness"],
)
def test_a_study_on_disk_whose_second_judge_taught_a_stage_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], refused: bool
) -> None:
    """As one from before such recipes were refused."""
    request = Request("hh-scratch", ("data.name=x", "stage.grpo.reward_model=rm2", *more), tokens=0)
    nothing: Any = None
    own = make_design(
        Request("hh-scratch", tokens=0), load_recipe("hh-scratch", ["data.name=x"]).config, nothing, nothing
    )

    def made(_: Request, config: RunConfig, *__: Any) -> Design:
        return replace(own, config=config)

    with monkeypatch.context() as patch:  # the design of then
        patch.setattr(launch, "make_design", made)
        patch.setattr(launch, "checked_data", lambda *_: (None, None))
        patch.setattr("preftune.runs.lengths.mean_lengths", lambda *_: None)
        design = launch._design(request, tmp_path)
    if refused:
        with pytest.raises(ConfigError, match=r"some stage learns \(rm, rm2\)"):
            run_study(request, tmp_path, seeds=1)
    else:
        assert launch._design(request, tmp_path) == design


def test_the_command(two_seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cli"
    shutil.copytree(two_seeds, out)
    (out / "study.json").unlink()
    words = [
        "study",
        "tiny",
        "--seeds",
        "2",
        "--first-seed",
        "3",
        "--pairs",
        "20",
        "--replies",
        "2",
        "--no-reports",
    ]
    assert cli.main([*words, *SMALL, f"out={out}"]) == 0
    assert set(study_json(out)["policies"]) == POLICIES
    assert cli.main(["study", "tiny", "--sweep", "nonsense", f"out={tmp_path / 'x'}"]) == 64
    assert "cannot sweep" in capsys.readouterr().err


def test_a_failing_seed_is_reported(two_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: one seed's directory holds something else; the other one is fine, and its
    process only puts its numbers back.
    """
    out = tmp_path / "failing"
    shutil.copytree(two_seeds, out)
    for seed in SEEDS:
        (out / f"seed-{seed}" / "study" / "seed.json").unlink()
    (out / "seed-4" / "stages" / "sft" / "stage.json").write_text('{"key": "other", "inputs": {}}')
    files = [str(place / "seed-3" / "study" / "seed.json") for place in (two_seeds, out)]
    fine = [sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])", *files]
    usual = Task.words.fget
    monkeypatch.setattr(Task, "words", property(lambda task: fine if task.seed == 3 else usual(task)))
    with pytest.raises(PreftuneError, match="1 of 2 seeds failed; seed 4") as caught:
        run_study(wanted(), out, seeds=2, first_seed=3, jobs=2, reports=False)
    assert "made with other settings" in str(caught.value)
    assert caught.value.code == ConfigError.code
    assert (out / "seed-3" / "study" / "seed.json").is_file()
