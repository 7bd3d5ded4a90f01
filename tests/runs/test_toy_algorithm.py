"""An algorithm from outside, defined here and registered by one call, goes everywhere the others go.

Best-of-n distillation: imitate the chosen responses, but only those that the policy finds unlikely. It is
no good idea; it needs a policy and a reference, has a setting and a metric of its own.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

import preftune
from damages import shown_by
from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.api import run_recipe
from preftune.cli import main
from preftune.config import (
    ALGORITHM_CONFIGS,
    Healthy,
    OfflineConfig,
    OptimizerConfig,
    load_recipe,
    options,
    register,
    show_plan,
)
from preftune.config import algorithm_field as named
from preftune.data import Sequences
from preftune.errors import ConfigError
from preftune.functional import token_mean
from preftune.models.roles import Role
from preftune.report import load_run
from preftune.report.plots.figures import draw
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.verify.attempts import different, outcome

TOY = (
    "stage.toy.algorithm=toy",
    "stage.toy.rows=64",
    "stage.toy.pull=0.5",
    "stage.ppo=none",
    "stage.dpo=none",
    "stage.grpo.steps=2",
    "model.scratch.steps=20",
    "evaluation.prompts=8",
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


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """While this file is tested: others go over the registry as it is in the package."""
    register(ToyConfig)
    yield
    del ALGORITHM_CONFIGS["toy"]


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
    assert "toy     from sft: 64 rows in batches of 16" in show_plan(load_recipe("tiny", TOY))


def test_its_learner_side_is_built_from_what_it_needs(run: RunDir) -> None:
    rows = read_jsonl(run.metrics("toy"))
    assert len(rows) == 4
    assert rows[0]["pulled"] == 0.0  # policy and reference begin as the same model
    assert rows[-1]["pulled"] > 0
    assert read_json(run.stage_json("toy"))["parents"] == ["sft"]
    assert {row["rows"][0].partition(":")[0] for row in read_jsonl(run.ledger("toy"))}


def test_it_is_evaluated_reported_and_described(run: RunDir) -> None:
    assert read_json(run.evaluation("policy_toy"))["label"] == "Toy"
    analysis = run.analysis_text.read_text(encoding="utf-8")
    assert "Toy" in analysis
    _, words = draw(shown_by(load_run(run), run.metrics("toy")))["training_toy.svg"]
    assert "pulled (healthy: below 7)" in words
    card = (run.model_dir("toy") / "README.md").read_text(encoding="utf-8")
    assert "This is a toy that nobody should use." in card
    assert "- It is a toy." in card


def test_killed_and_resumed_it_is_the_same_bit_for_bit(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill would: in the middle of a step, nothing runs after it (by SIGKILL: tests/faults)."""

    class Killed(Exception):
        pass

    def dies(self: Toy, batch: Sequences) -> Loss:
        calls.append(1)
        if len(calls) == 6:  # the second half of step 3
            raise Killed
        return loss(self, batch)

    loss, calls = Toy.loss, list[int]()
    words = ["train", "tiny", "toy", *TOY, "--out", str(tmp_path / "run")]
    killed = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(killed.stage_dir("toy"))
    shutil.rmtree(killed.model_dir("toy"))
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "loss", dies)
        with pytest.raises(Killed):
            run_recipe("tiny", TOY, out=str(killed.path), until="toy")
    assert read_json(killed.stage_json("toy"))["status"] == "running"
    assert main(words) == 0
    ends = (outcome(made, "toy") for made in (run, killed))
    assert different(*ends) == []


def test_it_takes_part_in_a_study() -> None:
    from preftune.runs.lengths import Lengths
    from preftune.runs.sources import load_dataset
    from preftune.study.design import Request, make_design
    from preftune.study.tokens import planned_tokens

    config = load_recipe("tiny", TOY).config
    lengths = Lengths(prompt=10.0, chosen=5.0, rejected=7.0)
    assert planned_tokens(config.stage["toy"], lengths, 300) == 64 * 15
    dataset = load_dataset(config.data, 0)
    wanted = Request("tiny", TOY, sweep="stage.toy.pull=0.1,0.5", tokens=15 * 48)
    design = make_design(wanted, config, dataset, lengths)
    assert design.config.stage["toy"].rows == 48  # type: ignore[attr-defined]
    assert design.sweeps == {"stage.toy.pull": {"0.1": "toy-pull-0_1", "0.5": "toy"}}


def test_the_class_is_found_by_its_name() -> None:
    assert ALGORITHMS["toy"] is Toy
