"""Algorithms from outside, defined here and registered by one call each, go everywhere the others go.

Two that are no good idea: one imitates the chosen responses and is pulled back to where it began, with a
setting and a metric of its own; one samples, and raises what scored more than the mean of the batch.
"""

import io
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field
from rich.console import Console
from torch import Tensor

import preftune
import prose
from damages import shown_by
from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.algorithms.on_policy import (
    group_updates,
    kl_per_sequence,
    response_metrics,
    sampled,
    sampled_step,
)
from preftune.api import run_recipe
from preftune.cli import main
from preftune.config import (
    ALGORITHM_CONFIGS,
    Healthy,
    OfflineConfig,
    OnlineConfig,
    OptimizerConfig,
    load_recipe,
    options,
    register,
    show_plan,
)
from preftune.config import algorithm_field as named
from preftune.config.base import NonNegative
from preftune.data import Sequences
from preftune.data.batch import Prompts, Rows
from preftune.errors import ConfigError
from preftune.functional import token_mean
from preftune.models.roles import Role
from preftune.report import load_run
from preftune.report.plots.figures import draw
from preftune.rollout.rollout import Rollout
from preftune.rollout.score import Scorer
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.lengths import Lengths
from preftune.runs.sources import dataset_of
from preftune.study.design import Request, make_design
from preftune.study.launch import run_study
from preftune.study.tokens import planned_tokens
from preftune.sums import read_sealed, write_sealed
from preftune.verify.attempts import different, outcome
from preftune.watch.following import Watched
from preftune.watch.frame import frame

TOY = (
    "stage.toy.algorithm=toy",
    "stage.toy.rows=64",
    "stage.toy.pull=0.5",
    "stage.ppo=none",
    "stage.dpo=none",
    "stage.grpo=none",
    "stage.nudge.algorithm=nudge",
    "stage.nudge.steps=3",
    "stage.nudge.batch_size=8",
    "stage.nudge.max_new_tokens=8",
    "stage.nudge.missing_eos_score=none",  # few end in time: their scores would all be equal
    "stage.nudge.learning_rate=1e-3",
    "model.scratch.steps=20",
    "evaluation.prompts=8",
)
# The smallest study: two prompts, a step of each stage.
STUDY = (
    "stage.toy.algorithm=toy",
    *(f"stage.{name}=none" for name in ("ppo", "grpo", "dpo")),
    *("stage.sft.rows=32", "stage.rm.rows=32", "stage.toy.rows=16"),
    *("model.scratch.steps=2", "data.pairs=120", "evaluation.prompts=2", "evaluation.max_new_tokens=6"),
    *("evaluation.best_of=2", "evaluation.pool=2", "evaluation.resamples=20"),
)


class ToyConfig(OfflineConfig):
    """Imitation that is pulled back to where it began."""

    label: ClassVar[str] = "Toy"
    implementation: ClassVar[str] = f"{__name__}:Toy"
    batch: ClassVar[Literal["sequences"]] = "sequences"
    headline: ClassVar[Mapping[str, str]] = {"pulled": "pull"}
    healthy: ClassVar[Mapping[str, Healthy]] = {"pulled": Healthy(words="below 7", high=7.0)}
    not_drawn: ClassVar[frozenset[str]] = frozenset({"loss"})
    card: ClassVar[str] = "a toy that nobody should use"
    card_limits: ClassVar[tuple[str, ...]] = ("- It is a toy.",)

    algorithm: Literal["toy"] = named("toy")
    init: str = Field(default="sft", description="Start and reference.")
    rows: int | None = Field(default=None, description="Rows.")
    epochs: int = Field(default=1, description="Passes.")
    batch_size: int = Field(default=16, description="Responses per update.")
    microbatch_size: int = Field(default=8, description="Responses in memory.")
    learning_rate: float = Field(default=1e-3, description="Rate.")
    pull: Annotated[float, Field(ge=0)] = Field(default=0.1, description="Weight of the way back.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")


class Toy:
    Config: ClassVar[type[ToyConfig]] = ToyConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, config: ToyConfig, models: Mapping[str, Role], learner: Learner) -> None:
        self.config, self.learner, self.roles = config, learner, Roles(models)

    def step(self, batch: Sequences) -> Metrics:
        tokens = self.learner.total(batch.response.sum())
        metrics = self.learner.update("policy", batch, token_mean(batch.response, tokens), self.loss)
        return {**metrics, "tokens/trained": float(batch.attention.sum())}

    def loss(self, batch: Sequences) -> Loss:
        ours = self.roles.policy.logprobs(batch)
        far = (ours - self.roles.reference.logprobs(batch)).square()
        return Loss(self.config.pull * far - ours, {"pulled": far.detach()})


class NudgeConfig(OnlineConfig):
    """The score less the batch's mean, times the log-probability."""

    label: ClassVar[str] = "Nudge"
    implementation: ClassVar[str] = f"{__name__}:Nudge"
    card: ClassVar[str] = "a policy that was nudged"

    algorithm: Literal["nudge"] = named("nudge")
    kl_coef: NonNegative = Field(default=0.0, description="Only to compare checkpoints.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Rows):
    sequences: Sequences
    centred: Tensor


class Nudge:
    Config: ClassVar[type[NudgeConfig]] = NudgeConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(
        self, config: NudgeConfig, models: Mapping[str, Role], learner: Learner, scorer: Scorer | None = None
    ) -> None:
        self.config, self.learner, self.roles, self.scorer = config, learner, Roles(models), scorer

    def step(self, batch: Prompts) -> Metrics:
        return sampled_step(self, batch)

    def rollout(self, batch: Prompts) -> Rollout:
        return sampled(batch, self.config, self.roles, self.scorer, self.learner)

    def improve(self, rollout: Rollout, seed: int = 0) -> Metrics:
        return group_updates(self, rollout, seed)

    def experience(self, rollout: Rollout) -> Scored:
        return Scored(sequences=rollout.learnable, centred=rollout.scores - rollout.scores.mean())

    def update(self, batch: Scored) -> Metrics:
        response = batch.sequences.response
        weights = token_mean(response, self.learner.total(response.sum()))
        return self.learner.update("policy", batch, weights, self.loss)

    def loss(self, batch: Scored) -> Loss:
        return Loss(-batch.centred.unsqueeze(1) * self.roles.policy.logprobs(batch.sequences))

    def report(self, rollout: Rollout) -> Metrics:
        kl, score = kl_per_sequence(rollout).mean().item(), rollout.scores.mean().item()
        return {**response_metrics(rollout, self.config), "reward": score, "kl_per_sequence": kl}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """While this file is tested: others go over the registry as it is in the package."""
    register(ToyConfig)
    register(NudgeConfig)
    yield
    del ALGORITHM_CONFIGS["toy"], ALGORITHM_CONFIGS["nudge"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few_pairs: None) -> RunDir:
    return preftune.run("tiny", *TOY, out=str(tmp_path_factory.mktemp("toy") / "run"))


def test_its_settings_are_checked_and_explained() -> None:
    assert load_recipe("tiny", TOY).config.stage["toy"].pull == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"stage.toy.pull = -1.0 \(on the command line\): expected a"):
        load_recipe("tiny", [*TOY, "stage.toy.pull=-1"])
    with pytest.raises(ConfigError, match=r"unknown key stage.toy.pul") as caught:
        load_recipe("tiny", [*TOY, "stage.toy.pul=1"])
    assert "did you mean stage.toy.pull?" in caught.value.hint
    assert "stage.toy.pull" in {option.key for option in options()}


def test_it_is_in_the_plan() -> None:
    plan = show_plan(load_recipe("tiny", TOY))
    toy, nudge = (line for line in plan.splitlines() if line.strip().startswith(("toy ", "nudge ")))
    assert "64 rows in batches of 16" in toy
    assert "3 steps of 8 responses" in nudge
    assert "scored by rm" in nudge
    prose.compare("runs/toy_algorithm: the plan of stages of one's own", toy, nudge)


def test_its_learner_side_is_built_from_what_it_needs(run: RunDir) -> None:
    rows = read_jsonl(run.metrics("toy"))
    assert len(rows) == 4
    assert rows[0]["pulled"] == 0.0  # policy and reference begin as the same model
    assert rows[-1]["pulled"] > 0
    assert read_json(run.stage_json("toy"))["parents"] == ["sft"]
    assert {row["rows"][0].partition(":")[0] for row in read_jsonl(run.ledger("toy"))}


def test_one_that_samples_is_given_a_scorer_and_prompts(run: RunDir) -> None:
    rows = read_jsonl(run.metrics("nudge"))
    assert [row["kl_per_sequence"] == 0.0 for row in rows] == [True, False, False]  # of what was sampled
    assert len({row["reward"] for row in rows}) == 3
    assert read_json(run.stage_json("nudge"))["parents"] == ["sft", "rm"]
    assert [len(row["rows"]) for row in read_jsonl(run.ledger("nudge"))] == [8] * 3


def test_they_are_evaluated_reported_and_described(run: RunDir) -> None:
    view, analysis = load_run(run), run.analysis_text.read_text(encoding="utf-8")
    for name, words, drawn in (
        ("toy", "a toy that nobody should use.", "pulled (healthy: below 7)"),
        ("nudge", "a policy that was nudged.", "reward"),
    ):
        assert read_json(run.evaluation(f"policy_{name}"))["label"] == name.capitalize()
        assert f"| {name.capitalize()} " in analysis
        assert drawn in draw(shown_by(view, run.metrics(name)))[f"training_{name}.svg"][1]
        card = (run.model_dir(name) / "README.md").read_text(encoding="utf-8")
        assert f"This is {words}" in card
        assert ("- It is a toy." in card) == (name == "toy")


def test_the_panel_shows_what_they_say_of_themselves(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    for name, numbers in (("toy", "loss pull"), ("nudge", "loss score KL length ended")):
        write_sealed(copy.stage_json(name), {**read_sealed(copy.stage_json(name)), "status": "running"})
        out = Console(file=io.StringIO(), width=100)
        out.print(frame(Watched(copy).look(), 60))
        shown = out.file.getvalue().partition("numbers")[2].partition("speed")[0]  # type: ignore[attr-defined]
        assert re.findall(r"(?:^|\u2502) +([A-Za-z]+) ", shown, re.MULTILINE) == numbers.split()
        shutil.rmtree(copy.stage_dir(name))


@pytest.mark.parametrize(("kind", "after"), [(Toy, 6), (Nudge, 3)], ids=["rows", "sampled"])
def test_killed_and_resumed_it_is_the_same_bit_for_bit(
    kind: type[Toy] | type[Nudge], after: int, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill would: in the middle of step 3, nothing runs after it (by SIGKILL: tests/faults)."""

    class Killed(Exception):
        pass

    def dies(self: Any, batch: Any) -> Loss:
        calls.append(1)
        if len(calls) == after:  # the second half of step 3; where a step has one pass, the whole
            raise Killed
        return loss(self, batch)

    loss, calls, name = kind.loss, list[int](), kind.Config.name()
    words = ["train", "tiny", name, *TOY, "--out", str(tmp_path / "run")]
    killed = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(killed.stage_dir(name))
    shutil.rmtree(killed.model_dir(name))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", dies)
        with pytest.raises(Killed):
            run_recipe("tiny", TOY, out=str(killed.path), until=name)
    assert read_json(killed.stage_json(name))["status"] == "running"
    assert main(words) == 0
    ends = (outcome(made, name) for made in (run, killed))
    assert different(*ends) == []


def test_its_study_is_designed() -> None:
    config = load_recipe("tiny", TOY).config
    lengths = Lengths(prompt=10.0, chosen=5.0, rejected=7.0)
    assert planned_tokens(config.stage["toy"], lengths, 300) == 64 * 15
    dataset = dataset_of(config.data, 0)
    wanted = Request("tiny", TOY, sweep="stage.toy.pull=0.1,0.5", tokens=15 * 48)
    design = make_design(wanted, config, dataset, lengths)
    assert design.config.stage["toy"].rows == 48  # type: ignore[attr-defined]
    assert design.sweeps == {"stage.toy.pull": {"0.1": "toy-pull-0_1", "0.5": "toy"}}


def test_its_study_is_run_and_pooled(tmp_path: Path) -> None:
    request = Request("tiny", STUDY, tokens=0, fresh_pairs=20, replies=1)
    study = read_json(run_study(request, tmp_path, seeds=1, reports=False))
    assert set(study["policies"]) == {"base", "sft", "toy", "best_of_2"}
    toy = study["policies"]["toy"]
    assert (toy["label"], toy["n_seeds"], toy["n_prompts"]) == ("Toy", 1, 2)
    (row,) = read_jsonl(RunDir(tmp_path / "seed-0").metrics("toy"))
    assert toy["tokens_trained"] == row["tokens/trained"]
    measured = read_json(tmp_path / "seed-0" / "study" / "toy.json")["sets"][study["main_set"]]
    assert toy["kl"] == pytest.approx(fmean(measured["kl"]))
    assert "| Toy " in (tmp_path / "STUDY.md").read_text(encoding="utf-8")


def test_the_class_is_found_by_its_name() -> None:
    assert ALGORITHMS["toy"] is Toy
