"""A reward stage with several members: what they are together, alone, after a kill, and when one is added."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

import preftune
from made_once import small_world
from preftune.algorithms.reward import Reward
from preftune.api import audit, run_recipe
from preftune.config import load_recipe
from preftune.errors import ConfigError, DataError, UsageError
from preftune.export.model import find
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.sums import write_sealed
from preftune.verify.attempts import different, outcome

SMALL = ["model.scratch.steps=10", "stage.sft.rows=64", "stage.rm.rows=64", "stage.rm.learning_rate=1e-2"]
THREE = [*SMALL, "stage.rm.members=3", "stage.rm.combine=mean-sd", "model.trainable=top:1"]
JUDGED = ["stage.ppo.steps=1", "stage.ppo.batch_size=4", "stage.grpo=none", "stage.dpo=none"]
JUDGED += [
    "stage.pairs.algorithm=collect",
    "stage.pairs.judge=rm",
    "stage.pairs.rows=8",
    "evaluation.prompts=4",
]
PROMPTS = ["\n\nHuman: Hello.\n\nAssistant:", "\n\nHuman: What does the cat like?\n\nAssistant:"]
REPLIES = [" It likes milk.", " No."]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, own_states: None) -> RunDir:
    """An ensemble of three that scores PPO, collected replies and the evaluation."""
    out = tmp_path_factory.mktemp("ensemble") / "run"
    with small_world():
        return preftune.run("tiny", *THREE, *JUDGED, out=str(out))


@pytest.fixture
def begun(run: RunDir, tmp_path: Path) -> RunDir:
    """The same run, its reward stage and all that reads it still to be done."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    for name in ("rm", "ppo", "pairs", "evaluation"):
        shutil.rmtree(copy.stage_dir(name))
    shutil.rmtree(copy.models / "reward_model")
    return copy


def train(run: RunDir, *words: str, **options: str) -> str:
    with small_world():
        run_recipe("tiny", [*THREE, *JUDGED, *words], out=str(run.path), until="rm", **options)  # type: ignore[arg-type]
    return "\n".join(path.read_text() for path in sorted((run.path / "logs").iterdir()))


def stopped_in_the_second_member(run: RunDir, monkeypatch: pytest.MonkeyPatch, **options: str) -> None:
    """As a kill would: in the middle of a step, without a last checkpoint."""
    step, calls = Reward.step, list[int]()

    def dies(self: Reward, batch: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:  # two steps a member
            raise KeyboardInterrupt
        return step(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Reward, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(run, **options)


def test_one_score_is_made_of_those_of_plain_reward_models(run: RunDir) -> None:
    place = run.models / "reward_model"
    ensemble = preftune.load_reward_model(place)
    alone = np.array(
        [preftune.load_reward_model(place / f"member-{i}").score(PROMPTS, REPLIES).numpy() for i in range(3)]
    )
    AutoModelForSequenceClassification.from_pretrained(place / "member-1", use_safetensors=True)
    assert len({tuple(row) for row in alone.round(4)}) == 3
    np.testing.assert_allclose(ensemble.member_scores(PROMPTS, REPLIES), alone, atol=1e-5)
    by_hand = alone.mean(0) - 0.5 * alone.std(0)
    np.testing.assert_allclose(ensemble.raw_score(PROMPTS, REPLIES), by_hand, atol=1e-5)
    side = read_json(place / "preftune.json")
    unit = (by_hand - side["mean"]) / side["std"]
    np.testing.assert_allclose(ensemble.score(PROMPTS, REPLIES), unit, atol=1e-5)


def test_members_read_the_same_rows_in_orders_of_their_own(run: RunDir) -> None:
    orders = [[row["rows"] for row in read_jsonl(run.ledger(f"rm/member-{i}"))] for i in range(3)]
    assert len({str(order) for order in orders}) == 3
    assert len({frozenset(row for step in order for row in step) for order in orders}) == 1
    mean = [row["loss"] for row in read_jsonl(run.metrics("rm"))]
    losses = [[row["loss"] for row in read_jsonl(run.metrics(f"rm/member-{i}"))] for i in range(3)]
    np.testing.assert_allclose(mean, np.mean(losses, 0), rtol=1e-6)


def test_card_report_and_record_say_what_the_members_reach(run: RunDir) -> None:
    record = read_json(run.reward_evaluation)
    assert list(record["members"]) == ["member-0", "member-1", "member-2"]
    assert record["combine"] == "mean - 0.5 sd"
    assert 0 < record["unanimous"]["n"] < record["n"]
    assert record["disagreement"]["mean"] > 0
    card = (run.models / "reward_model" / "README.md").read_text()
    assert f"| the same of `member-1` | {record['members']['member-1']['value']:.3f} [" in card
    assert "ensemble of 3 (score: mean - 0.5 sd)" in run.analysis_text.read_text()


def test_scores_come_with_the_members(run: RunDir) -> None:
    """In collected replies and in samples: combined by hand they are the score, up to its normalisation."""
    side = read_json(run.models / "reward_model" / "preftune.json")
    rows = read_jsonl(run.collected("pairs") / "replies.jsonl")
    found = [pair for row in rows for pair in zip(row["scores"], row["members"], strict=True)]
    found += [(row["score"], row["members"]) for row in read_jsonl(run.samples_file("policy_ppo"))]
    members = np.array([each for _, each in found])
    combined = members.mean(1) - 0.5 * members.std(1)
    np.testing.assert_allclose([s for s, _ in found], (combined - side["mean"]) / side["std"], atol=1e-5)
    assert read_json(run.evaluation("policy_ppo"))["disagreement"]["mean"] > 0


def test_a_kill_in_a_member_changes_no_bit(
    run: RunDir, begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_in_the_second_member(begun, monkeypatch)
    assert read_json(begun.stage_json("rm"))["status"] == "running"
    said = train(begun)
    assert "rm/member-0  already finished" in said
    whole, killed = (outcome(each, "rm") for each in (run, begun))
    assert different(whole, killed) == []
    assert "rm           already finished" in train(begun)


def test_another_machine_goes_on_from_the_mirror(
    run: RunDir, begun: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = str(tmp_path / "mirror")
    stopped_in_the_second_member(begun, monkeypatch, mirror=mirror)
    shutil.rmtree(begun.stage_dir("rm"))
    shutil.rmtree(begun.models / "reward_model")
    write_sealed(tmp_path / "mirror" / "commits.json", {"data some/where": "abc"})
    assert "rm/member-0  fetched from" in train(begun, mirror=mirror)
    assert (tmp_path / "mirror" / "commits.json").is_file()
    whole, fetched = (outcome(each, "rm") for each in (run, begun))
    assert different(whole, fetched) == []
    assert [path.name for path in sorted((tmp_path / "mirror" / "rm").glob("*/mirror.json"))] == [
        "mirror.json"
    ]


def test_a_member_more_or_another_combination_trains_no_other(begun: RunDir, run: RunDir) -> None:
    shutil.copytree(run.stage_dir("rm"), begun.stage_dir("rm"))
    shutil.copytree(run.models / "reward_model", begun.models / "reward_model")
    before = (begun.models / "reward_model" / "member-2" / "model.safetensors").read_bytes()
    said = train(begun, "stage.rm.members=4", "stage.rm.combine=min")
    assert [f"rm/member-{i}  already finished" in said for i in range(4)] == [True, True, True, False]
    assert (begun.models / "reward_model" / "member-2" / "model.safetensors").read_bytes() == before
    train(begun, "stage.rm.members=2", "stage.rm.combine=min")
    assert {path.name for path in (begun.models / "reward_model").glob("member-*")} == {
        "member-0",
        "member-1",
    }
    with pytest.raises(ConfigError, match="learning_rate"):
        train(begun, "stage.rm.members=2", "stage.rm.combine=min", "stage.rm.learning_rate=1e-3")


def test_an_audit_looks_at_every_member_and_notices_a_damaged_one(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    found = audit(copy.models / "reward_model")
    assert found["kind"] == "reward model"
    names = {check["name"] for check in found["checks"]}
    assert {"loads as an ensemble", "member-0: scores", "member-2: plain sense"} <= names
    file = copy.models / "reward_model" / "member-1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(DataError, match=r"member-1/model\.safetensors is not what was written"):
        preftune.load_reward_model(copy.models / "reward_model")
    assert audit(copy.models / "reward_model")["verdict"] == "not usable"


def test_for_others_a_member_is_a_model_and_the_ensemble_is_none(run: RunDir) -> None:
    with pytest.raises(UsageError, match="only preftune reads"):
        find(str(run.path), "rm")
    assert find(str(run.path), "rm/member-1").directory == run.models / "reward_model" / "member-1"


def test_one_model_has_nothing_to_combine() -> None:
    with pytest.raises(ConfigError, match="members = 2 or more"):
        load_recipe("tiny", ["stage.rm.combine=min"])
