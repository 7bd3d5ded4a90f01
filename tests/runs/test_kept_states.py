"""Two runs that train the upper blocks: what lies below stays, and its states are computed once for both."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from preftune import api
from preftune.cli import main
from preftune.models import kept
from preftune.models.fast.passing import PassingDecoder
from preftune.models.roles import models_of
from preftune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from preftune.runs import collect, roles
from preftune.world.dataset import make_world

pytestmark = pytest.mark.usefixtures("own_states", "few_pairs")

JUDGES = ("reward_model", "policy_dpo")
SETTINGS = (
    "model.trainable=top:1",
    "model.scratch.steps=2",
    "stage.sft.rows=64",
    "stage.rm.rows=64",
    "stage.dpo.rows=64",
    "evaluation.prompts=4",
    "evaluation.max_new_tokens=4",
)


@pytest.fixture(scope="module")
def runs(own_states: None, few_pairs: None, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Two of the same settings, the second of which finds the states of the first."""
    made, first = list[RunDir](), dict[Path, int]()
    for name in ("one", "two"):
        made.append(RunDir(tmp_path_factory.mktemp(name)))
        for train in (api.dpo_train, api.train_reward_model):
            train("tiny", *SETTINGS, out=str(made[-1].path))
        first = first or kept.sizes()
    assert len(first) == 1  # one trunk for all stages: policy, reference, reward model
    assert list(kept.sizes()) == list(first)
    return made


def test_stages_leave_the_blocks_below_as_they_were_and_states_change_no_bit(runs: list[RunDir]) -> None:
    base = load_file(runs[0].models / "base" / "model.safetensors")
    for model in ("policy_sft", "policy_dpo", "reward_model"):
        one, two = (load_file(run.models / model / "model.safetensors") for run in runs)
        assert all(one[key].equal(two[key]) for key in one)
        moved = {key for key in base if key in one and not one[key][: len(base[key])].equal(base[key])}
        assert moved
        assert all(key.startswith(("transformer.h.1.", "transformer.ln_f")) for key in moved)
    one, two = ([row["loss"] for row in read_jsonl(run.metrics("dpo"))] for run in runs)
    assert one == two
    inputs = read_json(runs[0].stage_json("dpo"))["inputs"]
    assert inputs["trainable"] == "top:1"
    assert "trainable" not in inputs["settings"]


def test_states_of_measured_pairs_are_computed_once_and_change_no_score(
    runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = runs[0], tmp_path / "theirs.jsonl"
    pairs = make_world(7, 1, 1, 30).test
    rows = [{"prompt": p.prompt.transcript(), "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    write_jsonl(file, rows)

    def measured() -> tuple[Any, Any, int]:
        """What the reward model and DPO make of the pairs, and the bytes of the index of kept states."""
        (index,) = kept.states_dir().glob("*/rows.idx")
        assert main(["evaluate", str(run.path), "--pairs", str(file)]) == 0
        judge, policy = (read_json(run.pairs("theirs") / f"{name}.json") for name in JUDGES)
        return judge, policy["preference"], index.stat().st_size

    (index,) = kept.states_dir().glob("*/rows.idx")
    trained = index.stat().st_size
    first, again = measured(), measured()
    assert first == again
    assert trained < first[2]
    monkeypatch.setattr(roles, "keep_on_disk", lambda *_: None)
    judge, policy, _ = measured()
    assert judge["score"] == pytest.approx(first[0]["score"], rel=1e-3)
    assert judge["accuracy"] == first[0]["accuracy"]
    assert policy["mean_margin"]["mean"] == pytest.approx(first[1]["mean_margin"]["mean"], abs=1e-3)


def test_a_judge_of_collected_replies_goes_on_from_the_states_that_their_policy_left(
    runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = ("algorithm=collect", "judge=rm", "rows=6", "max_new_tokens=4")
    settings = [*SETTINGS, *(f"stage.pairs.{each}" for each in pairs)]
    passes, share = list[int](), collect.share

    def counting(role: Any, top: int | None) -> None:
        share(role, top)
        for model in models_of(role):
            block = model.base_model.get_submodule("h.0")
            own, number = block.forward, len(passes)
            passes.append(0)

            def forward(*args: Any, own: Any = own, number: int = number, **named: Any) -> Any:
                passes[number] += 1
                return own(*args, **named)

            monkeypatch.setattr(block, "forward", forward)

    def replies(name: str, sharing: Any) -> list[Any]:
        run = RunDir(shutil.copytree(runs[0].path, tmp_path / name))
        monkeypatch.setattr(collect, "share", sharing)
        api.run_recipe("tiny", settings, out=str(run.path), until="pairs")
        return read_jsonl(run.collected("pairs") / "replies.jsonl")

    shared, plain = replies("shared", counting), replies("plain", lambda *_: None)
    assert passes[0] > 0  # of the policy
    assert passes[1:] == [0]  # of the judge
    for one, two in zip(shared, plain, strict=True):
        assert one["replies"] == two["replies"]
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-4)


def test_an_evaluation_takes_over_the_states_of_the_replies_that_it_samples(
    runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, taken = RunDir(shutil.copytree(runs[1].path, tmp_path / "run")), list[int]()
    hand_over = PassingDecoder.hand_over

    def counting(decoder: PassingDecoder, ids: Any, attention: Any) -> None:
        taken.append(len(ids))
        hand_over(decoder, ids, attention)

    monkeypatch.setattr(PassingDecoder, "hand_over", counting)
    assert main(["evaluate", str(run.path)]) == 0
    names = [file.stem for file in run.evaluation("").parent.glob("policy_*.json")]
    assert sorted(names) == ["policy_dpo", "policy_sft"]
    assert sum(taken) >= 4 * len(names)  # four prompts each, and the pool of best-of-n
