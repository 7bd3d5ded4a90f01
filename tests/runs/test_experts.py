"""A reward model of experts: who learns from what, and whose word counts for which prompt."""

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import preftune
import prose
from preftune.api import audit, run_recipe
from preftune.cli import main
from preftune.config import load_recipe
from preftune.data import Preference, Sequences, load_dataset, parse_prompt, row_key
from preftune.data.batch import pad_sequences
from preftune.errors import ConfigError, DataError
from preftune.measure import planned
from preftune.measure.compare import compare_runs
from preftune.measure.estimate import Cost
from preftune.models.fast.support import states_below
from preftune.models.gate import (
    PromptGate,
    StateGate,
    TokenGate,
    fit_state_gate,
    fit_token_gate,
    load_gate,
)
from preftune.models.locate import Source
from preftune.models.scalar import load_scalar_model
from preftune.models.trunk import share_trunk
from preftune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from preftune.runs import ensemble
from preftune.runs.console import Console
from preftune.runs.plan import show_plan
from preftune.runs.sources import learners_rows
from preftune.runs.stages import OtherSettings, Stage
from tiny import classifier, without_sums

WORDS = {"harmless": "knife poison", "helpful": "recipe garden"}
SMALL = ["data.held_out=0.2", "model.scratch.steps=5", "stage.sft.rows=32", "stage.rm.learning_rate=1e-2"]
SMALL += ["stage.ppo.steps=1", "stage.ppo.batch_size=4", "stage.grpo=none", "stage.dpo=none"]
SMALL += ["evaluation.prompts=4"]
EXPERTS = "stage.rm.experts=harmless, helpful"


def prompt(kind: str, number: int) -> str:
    return f"\n\nHuman: Tell me about {WORDS[kind]} number {number}.\n\nAssistant:"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of pairs that contradict each other: yes is right in one, no in the other."""
    place = tmp_path_factory.mktemp("pairs")
    for kind, (good, bad) in {"harmless": (" No.", " Yes."), "helpful": (" Yes.", " No.")}.items():
        (place / f"{kind}-base").mkdir()
        rows = [{side: prompt(kind, i) + text for side, text in (("chosen", good), ("rejected", bad))}
                for i in range(60)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{kind}-base" / "train.jsonl").write_text(text)
    return place


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("experts") / "run"
    return preftune.run("tiny", f"data.name={data}", *SMALL, EXPERTS, out=str(out))


def contents(run: RunDir, *folders: str) -> dict[Path, bytes]:
    return {p: p.read_bytes() for folder in folders for p in (run.path / folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def frozen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """As `run`, with a frozen lower block that the experts share."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    words = [f"data.name={data}", *SMALL, EXPERTS, "model.trainable=top:1"]
    return RunDir(run_recipe("tiny", words, out=str(out), until="rm").path)


def expert_of(place: Path) -> PreTrainedModel:
    return load_scalar_model(Source(f"{place}/member-0"))


def shares_of(place: Path, prompts: Sequence[str]) -> Tensor:
    """What the gate of a saved ensemble says of prompts, each with a reply."""
    encoder, expert = preftune.load_reward_model(place).encoder, expert_of(place)
    ids = [encoder.text(text) for text in prompts]
    batch = pad_sequences(ids, [[1]] * len(ids), encoder.pad_id)
    with torch.no_grad():
        return by_prompt(load_gate(place, 2, expert), batch, expert)


def by_prompt(gate: PromptGate, batch: Sequences, model: PreTrainedModel | None = None) -> Tensor:
    """Shares (K, B); a gate of tokens needs no model."""
    return gate(model, batch.ids, batch.attention, batch.attention & ~batch.response)


def test_each_expert_learns_from_its_own_sources(run: RunDir) -> None:
    for i, kind in enumerate(WORDS):
        names = {name for step in read_jsonl(run.ledger(f"rm/member-{i}")) for name in step["rows"]}
        assert len(names) > 10
        assert all(f"{kind}-base" in name for name in names), names


@pytest.mark.parametrize("kind", ["run", "frozen"])
def test_the_prompt_says_whose_score_counts(kind: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(kind).models / "reward_model"
    model = preftune.load_reward_model(place)
    assert isinstance(load_gate(place, 2, expert_of(place)), TokenGate if kind == "run" else StateGate)
    prompts, replies = [prompt("harmless", 3), prompt("helpful", 3)] * 2, [" Yes."] * 2 + [" No."] * 2
    members = model.member_scores(prompts, replies)
    shares = shares_of(place, prompts)
    assert (shares[0] > 0.6).tolist() == [True, False, True, False]
    np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)
    chosen = np.asarray(members)[shares.argmax(0), range(4)]
    np.testing.assert_allclose(model.raw_score(prompts, replies), chosen, atol=1e-5)
    assert read_json(place / "preftune.json")["experts"] == "harmless, helpful"
    assert "load_reward_model  # member-0" in (place / "README.md").read_text()  # it has no weights


def test_record_report_and_plan_name_the_experts(run: RunDir) -> None:
    record = read_json(run.reward_evaluation)
    assert f"ensemble of 2 (score: {record['combine']})" in run.analysis_text.read_text()
    assert list(record["members"]) == ["member-0", "member-1"]
    seconds = [read_json(run.stage_json(f"rm/member-{i}"))["seconds"] for i in (0, 1)]
    assert read_json(run.stage_json("rm"))["seconds"] > sum(seconds)  # what combined them, too
    plan = load_recipe("tiny", [EXPERTS]).config.stage["rm"].plan([60, 9])
    assert "69 rows, 3 steps of 32" in plan
    assert plan.endswith("experts: harmless, helpful")
    prose.compare("runs/experts: what combines them, and their plan", record["combine"], plan)
    checks = audit(run.models / "reward_model")["checks"]
    assert ("loads as an ensemble", "ok") in {(check["name"], check["status"]) for check in checks}


def test_the_plan_counts_what_each_expert_learns_from(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its source, and of its half of the prompts."""
    costs: list[Cost] = []
    measured = planned.estimate
    monkeypatch.setattr(planned, "estimate", lambda *args: costs.extend(measured(*args)) or costs)
    words = [f"data.name={data}", *SMALL, EXPERTS, "stage.rm.part=first", "stage.rm.rows=none"]
    words += ["stage.rm.batch_size=4", "stage.rm.microbatch_size=4"]
    assert main(["plan", "tiny", *words]) == 0
    train = load_dataset(load_recipe("tiny", words).config.data).train
    kept = [row for row in train if int(row_key(row)[-1], 16) % 2 == 0]
    halves = [sum(f"{kind}-base" in row.source for row in kept) for kind in WORDS]
    assert 0 < sum(halves) < 0.7 * len(train)
    cost = next(cost for cost in costs if cost.name == "rm")
    assert (cost.rows, cost.steps) == (sum(halves), sum(math.ceil(rows / 4) for rows in halves))
    console = Console()
    dataset = load_dataset(load_recipe("tiny", words).config.data)
    show_plan(console, load_recipe("tiny", words).config, dataset, RunDir("x"), ["sft", "rm"])
    assert f"{sum(halves)} rows, {cost.steps} steps of 4, experts" in capsys.readouterr().out


def test_the_record_goes_on_to_the_end_of_the_longest_expert(tmp_path: Path) -> None:
    run, names = RunDir(tmp_path), ["rm", "rm/member-0", "rm/member-1"]
    stages = [Stage(name=name, algorithm="reward", parents=(), inputs={}) for name in names]
    for name, steps in zip(names[1:], (1, 3), strict=True):
        numbers = range(1, steps + 1)
        write_jsonl(run.metrics(name), [{"step": step, "loss": float(step)} for step in numbers])
        write_jsonl(run.ledger(name), [{"step": step, "rows": [f"{name[-1]}:{step}"]} for step in numbers])
    ensemble._logs(run, stages[0], stages[1:])
    assert [row["loss"] for row in read_jsonl(run.metrics("rm"))] == [1, 2, 3]
    assert [row["rows"] for row in read_jsonl(run.ledger("rm"))] == [["0:1", "1:1"], ["1:2"], ["1:3"]]


def test_a_half_without_prompts_is_refused() -> None:
    row = Preference(prompt=parse_prompt(prompt("helpful", 1)), chosen="a", rejected="b")
    part = ("second", "first")[int(row_key(row)[-1], 16) % 2]
    stage = load_recipe("tiny", [f"stage.dpo.part={part}"]).config.stage["dpo"]
    with pytest.raises(DataError, match=f"none of its 1 training rows is of the {part} half"):
        learners_rows([row], stage, "dpo")


def test_changed_experts_are_refused_before_anything_is_written(
    run: RunDir, data: Path, tmp_path: Path
) -> None:
    """Each member is another then; what is to be made again is the whole."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    before = contents(copy, "models", "stages", "config.toml")
    words = [f"data.name={data}", *SMALL, "stage.rm.experts=helpful, harmless"]
    with pytest.raises(OtherSettings, match="sources: harmless -> helpful") as caught:
        run_recipe("tiny", words, out=str(copy.path), until="rm")
    assert caught.value.stage == "rm"
    assert "--redo rm" in caught.value.hint
    assert contents(copy, "models", "stages", "config.toml") == before


def test_other_experts_are_other_members(run: RunDir, data: Path, tmp_path: Path) -> None:
    """Turned round, each name stands for another model: none of the two is believed."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    words = [f"data.name={data}", *SMALL, "stage.rm.experts=helpful, harmless"]
    run_recipe("tiny", words, out=str(copy.path), until="rm", redo=["rm"])
    before, after = (read_json(each.stage_json("rm/member-0"))["key"] for each in (run, copy))
    assert before != after


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage.rm.experts=harmless"], "two or more different words"),
        ([EXPERTS, "stage.rm.members=2"], "leave out members and sources"),
        ([EXPERTS, "stage.rm.sources=helpful"], "leave out members and sources"),
    ],
)
def test_settings_that_contradict_each_other(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe("tiny", words)


def test_a_source_that_is_not_there(data: Path, tmp_path: Path) -> None:
    words = [f"data.name={data}", *SMALL, "stage.sft.sources=helpless"]
    with pytest.raises(DataError, match=r"stage sft: none of the 81 .*'harmless-base', 'helpful-base'"):
        run_recipe("tiny", words, out=str(tmp_path / "run"), until="sft")


def test_an_expert_without_rows_is_named(data: Path, tmp_path: Path) -> None:
    words = [f"data.name={data}", *SMALL, "stage.rm.experts=harmless, helpless"]
    with pytest.raises(DataError, match=r"stage rm, expert helpless: none of the 81"):
        run_recipe("tiny", words, out=str(tmp_path / "run"), until="rm")


def test_rows_that_no_expert_learns_from_are_named(data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data")) / "honest-base"
    shutil.copytree(data / "helpful-base", other)
    (other / "train.jsonl").write_text((other / "train.jsonl").read_text().replace("recipe", "truth"))
    said = io.StringIO()
    words = [f"data.name={other.parent}", *SMALL, EXPERTS, "stage.sft.sources=honest"]
    with contextlib.redirect_stdout(said):
        run_recipe("tiny", words, out=str(tmp_path / "run"), until="rm")
    lines = re.sub(r"\d+ of", "N of", said.getvalue()).splitlines()
    sft, rm = (line for line in lines if "left out, by source" in line)
    assert sft.startswith("sft: ")
    assert "N of harmless-base, N of helpful-base" in sft
    assert rm.startswith("rm")
    assert "N of honest-base" in rm
    prose.compare("runs/experts: rows that nobody learns from", sft, rm)


def test_ensembles_that_differ_in_the_gate_are_two_judges(run: RunDir, tmp_path: Path) -> None:
    other = without_sums(RunDir(shutil.copytree(run.path, tmp_path / "other")))
    assert compare_runs(run, other, resamples=10)["same_reward_model"] is True
    file = other.models / "reward_model" / "gate.safetensors"
    gate = load_file(file)
    save_file({**gate, "bias": gate["bias"].flip(0).contiguous() + 1}, file)
    assert compare_runs(run, other, resamples=10)["same_reward_model"] is False


def test_the_gate_is_as_open_as_the_other_files(run: RunDir) -> None:
    files = [file for file in (run.models / "reward_model").iterdir() if file.is_file()]
    assert (run.models / "reward_model" / "gate.safetensors") in files
    assert len({file.stat().st_mode for file in files}) == 1


def test_a_damaged_gate_is_refused(run: RunDir, tmp_path: Path) -> None:
    place = Path(shutil.copytree(run.models / "reward_model", tmp_path / "model"))
    gate = load_file(place / "gate.safetensors")
    save_file({**gate, "weight": gate["weight"][:1].contiguous()}, place / "gate.safetensors")
    with pytest.raises(DataError, match="not a gate of 2 kinds"):
        preftune.load_reward_model(place)
    save_file({**gate, "bias": gate["bias"] * torch.nan}, place / "gate.safetensors")
    with pytest.raises(DataError, match="not finite"):
        preftune.load_reward_model(place)
    for blocks in (0, 99):
        save_file({**gate, "blocks": torch.tensor(blocks)}, place / "gate.safetensors")
        with pytest.raises(DataError, match="how many blocks"):
            preftune.load_reward_model(place)
    save_file({**gate, "blocks": torch.tensor(1)}, place / "gate.safetensors")  # its weights are for tokens
    with pytest.raises(DataError, match="another width"):
        preftune.load_reward_model(place)
    (place / "gate.safetensors").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        preftune.load_reward_model(place)


def test_a_gate_sees_the_prompt_alone_and_no_order() -> None:
    gate = fit_token_gate([[1, 2, 3], [1, 2], [4, 5], [4, 5, 5], [4], [6, 5]], [0, 0, 1, 1, 1, 1], 8)
    batch = pad_sequences([[1, 2, 3], [3, 2, 1, 1], [4, 5], []], [[4], [4, 4], [1, 2, 3], [7]], 0)
    shares = by_prompt(gate, batch)
    np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)
    assert shares[0, 0] == pytest.approx(float(shares[0, 1]), abs=1e-6)
    assert shares[0, 0] > 0.7 > 0.3 > shares[0, 2]
    alone = by_prompt(gate, pad_sequences([[4, 5]], [[7]], 0))
    assert float(alone[0, 0]) == pytest.approx(float(shares[0, 2]), abs=1e-6)


def test_a_gate_weighs_kinds_alike_however_many_prompts_each_has() -> None:
    """A prompt of tokens that no kind has is anybody's."""
    gate = fit_token_gate([[1]] * 2 + [[2]] * 50, [0] * 2 + [1] * 50, 4)
    shares = by_prompt(gate, pad_sequences([[3]], [[0]], 0))
    assert float(shares[0, 0]) == pytest.approx(0.5, abs=0.1)


def test_a_gate_of_states_is_a_logistic_regression_in_units_of_their_spread() -> None:
    states = torch.tensor([[0.0, 100.0], [1.0, 101.0], [0.0, 103.0], [1.0, 104.0]]).repeat(30, 1)
    kinds = [0, 0, 1, 1] * 30
    here, stretched = (fit_state_gate(states * scale, kinds, 1) for scale in (1.0, 1000.0))
    logits, far = (
        gate.weight @ states.T * scale + gate.bias[:, None]
        for gate, scale in ((here, 1.0), (stretched, 1000.0))
    )
    assert ((logits[1] > logits[0]) == torch.tensor(kinds).bool()).all()
    torch.testing.assert_close(logits, far, atol=1e-3, rtol=1e-3)
    assert abs(here.weight[0, 0]) < abs(here.weight[0, 1]) / 3  # the first state says nothing


def test_a_state_below_is_that_of_the_prompts_end_shared_or_not() -> None:
    model = classifier(0).eval()
    batch = pad_sequences([[1, 2, 3], [3, 2], [4]], [[4], [4, 5, 1], [1, 2]], 0)
    prompt = batch.attention & ~batch.response
    whole = model.base_model(batch.ids, attention_mask=batch.attention.long(), output_hidden_states=True)
    expected = whole.hidden_states[1][torch.arange(3), prompt.sum(1) - 1]
    alone = states_below(model, 1, batch.ids, batch.attention, prompt)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    share_trunk(model, 1)
    shared = states_below(model, 1, batch.ids, batch.attention, prompt)
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-5)
