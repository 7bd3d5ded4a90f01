"""Rows that a stage cannot use are refused before anything is trained, and the plan says what is read."""

from pathlib import Path
from typing import Any

import pytest

from preftune import api
from preftune.config import load_recipe
from preftune.errors import ConfigError, PreftuneError
from preftune.rundir import RunDir, read_json, write_jsonl
from preftune.runs.plan import check_kind
from preftune.runs.sources import dataset_of

PAIRS = [{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
REPLIES = [{"prompt": f"Q{i}", "completion": f"yes {i}"} for i in range(30)]
KTO = "stage.kto.algorithm=kto"
PROMPTS = [{"prompt": f"Q{i}"} for i in range(30)]
TEXTS = [{"text": f"Once upon a time there were {i} of them."} for i in range(30)]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    write_jsonl(path, rows)
    return path


@pytest.mark.parametrize(
    ("rows", "stage", "settings", "message"),
    [
        (PAIRS, "dpo", [], None),
        (REPLIES, "sft", [], None),
        (REPLIES, "ppo", [], None),
        (REPLIES, "dpo", [], "are replies without a rival, and the stage dpo (dpo) needs preference pairs"),
        (REPLIES, "kto", [KTO], "no training row is an undesirable reply, and the stage kto (kto) learns"),
        ([*REPLIES, {**REPLIES[0], "label": False}], "kto", [KTO], None),
        (REPLIES, "rm", [], "the stage rm (reward) needs preference pairs"),
        (PROMPTS, "sft", ["model.base=gpt2"], "are prompts without replies, and the stage sft (sft) needs"),
        (PROMPTS, "grpo", ["model.base=gpt2"], None),
        (PROMPTS, "grpo", [], "a base from scratch needs text"),
        (TEXTS, "sft", ["data.form=plain"], None),
        (TEXTS, "sft", [], "data.form = transcript would add roles"),
        (TEXTS, "ppo", ["data.form=plain"], "are texts for continuation, and the stage ppo (ppo) needs"),
    ],
)
def test_kinds_of_rows_and_stages(
    tmp_path: Path, rows: list[dict[str, Any]], stage: str, settings: list[str], message: str | None
) -> None:
    path = write(tmp_path, rows)
    config = load_recipe("tiny", [f"data.name={path}", *settings]).config
    dataset = dataset_of(config.data, 0)
    if message is None:
        check_kind(config, dataset, [stage], compared=False)
        return
    with pytest.raises(PreftuneError) as caught:
        check_kind(config, dataset, [stage], compared=False)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.code == (78 if isinstance(caught.value, ConfigError) else 65)


SFT_ALONE = tuple(f"stage.{name}=none" for name in ("rm", "ppo", "grpo", "dpo"))


def test_a_run_with_its_comparison_needs_replies(tmp_path: Path) -> None:
    config = load_recipe("tiny", [f"data.name={write(tmp_path, PROMPTS)}", "model.base=gpt2"]).config
    with pytest.raises(PreftuneError, match="policies are compared on held-out replies"):
        check_kind(config, dataset_of(config.data, 0), ["grpo"], compared=True)


def test_a_run_on_cut_texts_is_compared_and_measures_no_reward_model(tmp_path: Path) -> None:
    texts = [{"text": f"Film {i} was long and dull, and never ended."} for i in range(40)]
    small = ("model.scratch.steps=2", "stage.sft.rows=16", "evaluation.prompts=4", "evaluation.pool=4")
    task = (
        f"data.name={write(tmp_path, texts)}",
        "data.form=plain",
        "data.prompt_words=3",
        "data.held_out=0.2",
    )
    run = api.run("tiny", *task, *small, *SFT_ALONE, out=str(tmp_path / "run"))
    record = read_json(run.evaluation("policy_sft"))
    assert record["n_prompts"] == 4
    assert not run.reward_evaluation.exists()
    assert "scores may mean nothing" not in run.analysis_text.read_text(encoding="utf-8")  # there are none


def test_sft_learns_from_plain_texts_and_the_plan_says_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"data.name={write(tmp_path, TEXTS)}", "data.form=plain", "model.scratch.steps=1"]
    out = tmp_path / "run"
    model = api.supervised_finetune("tiny", *overrides, "stage.sft.rows=8", out=str(out))
    assert (model / "model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert "rows (texts for continuation)" in shown
    (line,) = (line for line in shown.splitlines() if "rows.jsonl: train" in line)
    assert "30 rows read, 30 kept" in line
    assert read_json(RunDir(out).data)["kind"] == "texts for continuation"
