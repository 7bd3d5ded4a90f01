"""Rows that are no pairs, through whole stages: labelled replies for KTO, prompts alone for PPO and GRPO."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prose
from preftune import api, cli
from preftune.config import load_recipe
from preftune.data.corpus import train_tokenizer
from preftune.errors import ConfigError, DataError
from preftune.models.load import scratch_gpt2
from preftune.models.locate import Source
from preftune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from preftune.runs.feed import make_feed
from preftune.runs.reopen import reopen
from preftune.runs.runner import _check_room
from preftune.runs.scoring import reward_model_of

LABELLED = [
    {"prompt": f"Q{i}", "completion": f"{'yes' if i % 3 else 'no'} {i}", "label": i % 3 > 0}
    for i in range(30)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([], 300)
    scratch_gpt2(tokenizer, layers=1, width=16, heads=2, positions=128, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return f"model.base={directory}"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    write_jsonl(path, rows)
    return str(path)


SCORES: list[int] = []


def words(prompt: str, response: str) -> int:
    SCORES.append(len(response.split()))
    return SCORES[-1]


def test_kto_learns_from_labelled_replies_and_sft_from_the_desirable_ones(tmp_path: Path, base: str) -> None:
    """20 of 30 training rows are desirable; a row is one of the 8 responses of a batch, not two of them."""
    held_out = [row | {"split": split} for split in ("validation", "test") for row in LABELLED[:3]]
    kept = [row | {"split": "train"} for row in LABELLED] + [
        row | {"prompt": f"held out {row['prompt']}"} for row in held_out
    ]
    data = write(tmp_path / "rows.jsonl", kept)
    small = ["stage.kto.algorithm=kto", "stage.kto.batch_size=8", "stage.sft.batch_size=10"]
    words = [f"data.name={data}", base, *small]
    run = api.run_recipe("tiny", words, out=str(tmp_path / "run"), until="kto")
    steps = [row["rows"] for row in read_jsonl(run.ledger("kto"))]
    assert [len(rows) for rows in steps] == [8, 8, 8, 8]  # 30 replies, filled up from the next epoch
    assert sorted({int(row) for rows in steps for row in rows}) == list(range(30))
    assert {int(row) for step in read_jsonl(run.ledger("sft")) for row in step["rows"]} == set(range(20))
    first = read_jsonl(run.metrics("kto"))[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["logps/rejected"] < 0
    recorded = read_json(run.stage_json("kto"))["inputs"]
    assert recorded["undesirable"]["rows"] == 10
    assert "undesirable" not in read_json(run.stage_json("sft"))["inputs"]
    session = reopen(run.path)
    encoder, rows = session.encoder(session.source("kto")), session.training_rows(stage="kto")
    feed = make_feed(session, "kto", encoder)
    lengths = [
        len(encoder.prompt(row.prompt)) + len(encoder.response(row.chosen or row.rejected)) for row in rows
    ]
    assert (feed.rows_per_step, feed.tokens) == (8, 2 * sum(lengths))  # half of them mismatched
    judge = reward_model_of(session, "kto", session.learner(8))
    scored = [encoder.sequences([(row.prompt, row.chosen)]) for row in rows if row.chosen]
    raw = torch.cat([judge.raw_scores(batch) for batch in scored])
    assert (judge.mean, judge.std) == pytest.approx((raw.mean().item(), raw.std().item()), abs=1e-5)


@pytest.mark.parametrize(("stage", "score"), [("ppo", "objective/scores"), ("grpo", "reward")])
def test_prompts_alone_are_enough_where_a_function_judges(
    tmp_path: Path, base: str, stage: str, score: str
) -> None:
    SCORES.clear()
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"Q{i}"} for i in range(30)])
    settings = {"init": "base", "reward_model": "none", "steps": 2, "batch_size": 8, "max_new_tokens": 6}
    settings |= {"reward_functions": "test_kinds_trained:words", "minibatches": 1}
    stages = [f"stage.{other}=none" for other in ("sft", "rm", "dpo", "ppo", "grpo") if other != stage]
    out = tmp_path / "run"
    given = [f"stage.{stage}.{key}={value}" for key, value in settings.items()]
    assert cli.main(["train", "tiny", stage, f"data.name={data}", base, *stages, *given, f"out={out}"]) == 0
    run = RunDir(out)
    assert (run.model_dir(stage) / "model.safetensors").is_file()
    scores = [sum(SCORES[i : i + 8]) / 8 for i in (0, 8)]  # of the two steps
    assert [row[score] for row in read_jsonl(run.metrics(stage))] == pytest.approx(scores)
    assert read_json(run.data)["kind"] == "prompts without replies"


def test_sft_on_its_own_replies_beside_prompts_alone_measures_no_loss_on_these(
    tmp_path: Path, base: str
) -> None:
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"Q{i}"} for i in range(30)])
    own = write(tmp_path / "own.jsonl", [{"prompt": f"A{i}", "completion": f"yes {i}"} for i in range(20)])
    words = [f"data.name={data}", base, f"stage.sft.data={own}", "stage.sft.batch_size=10"]
    run = api.run_recipe("tiny", words, out=str(tmp_path / "run"), until="sft")
    record = read_json(run.stage_json("sft"))
    assert record["status"] == "finished"
    assert "validation" not in record


def test_checkpoints_are_compared_on_rows_that_a_stage_could_learn_from(tmp_path: Path, base: str) -> None:
    """Held out are labelled replies, and the reward model has pairs of its own."""
    held_out = [row | {"split": "validation", "prompt": f"{row['prompt']}, held out"} for row in LABELLED[:6]]
    data = write(tmp_path / "rows.jsonl", [row | {"split": "train"} for row in LABELLED] + held_out)
    pairs = [{"prompt": f"A{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    own = f"stage.rm.data={write(tmp_path / 'pairs.jsonl', pairs)}"
    words = [f"data.name={data}", base, own, "checkpoint.best=true"]
    with pytest.raises(DataError, match="stage rm: no validation row is such as it learns from"):
        api.run_recipe("tiny", words, out=str(tmp_path / "run"), until="rm")
    kto = ["stage.kto.algorithm=kto", "stage.kto.init=base", "checkpoint.every=1"]
    run = api.run_recipe("tiny", [*words, *kto], out=str(tmp_path / "kto"), until="kto")
    assert "best" not in read_json(run.stage_json("kto"))
    said = "\n".join(path.read_text() for path in (run.path / "logs").iterdir())
    (line,) = (line for line in said.splitlines() if "warning: kto ends" in line)
    prose.compare("runs/kinds_trained: nothing to compare checkpoints on", line.partition(" ")[2])


def test_checkpoints_of_kto_on_labelled_replies_are_compared_on_both_replies_of_held_out_pairs(
    tmp_path: Path, base: str
) -> None:
    pairs = [{"prompt": f"A{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    rows = [row | {"split": "validation" if i < 6 else "train"} for i, row in enumerate(pairs)]
    own = f"stage.kto.data={write(tmp_path / 'labelled.jsonl', LABELLED)}"
    words = [f"data.name={write(tmp_path / 'pairs.jsonl', rows)}", base, own, "checkpoint.best=true"]
    words += ["stage.kto.algorithm=kto", "stage.kto.init=base", "stage.kto.batch_size=10"]
    run = api.run_recipe("tiny", words, out=str(tmp_path / "run"), until="kto")
    session = reopen(run.path)
    feed = make_feed(session, "kto", session.encoder(session.source("kto")))
    assert feed.held_out().desirable.tolist() == [True] * 6 + [False] * 6
    assert feed.batch_at(0).desirable.sum() < 10


def test_texts_of_a_stage_get_no_roles_either(tmp_path: Path, base: str) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": f"A story {i}."} for i in range(20)])
    with pytest.raises(ConfigError, match=r"texts\.jsonl: its rows are .* would add roles"):
        api.run_recipe("tiny", [base, f"stage.sft.data={texts}"], out=str(tmp_path / "run"), until="sft")


def test_replies_that_leave_no_room_for_a_prompt_are_refused_before_anything_is_trained(
    tmp_path: Path, base: str
) -> None:
    """The base reads 128 tokens. What only shortens prompts is said."""
    too_long = "stage.ppo.max_new_tokens=128"
    with pytest.raises(ConfigError, match=r"stage\.ppo\.max_new_tokens = 128 leaves no room .* 128 tokens"):
        api.run_recipe("tiny", [base, too_long], out=str(tmp_path / "run"), until="ppo")
    assert not (tmp_path / "run" / "stages").exists()
    said = list[str]()
    words = [
        base,
        "stage.ppo.max_new_tokens=100",
        "data.max_prompt_length=48",
        "evaluation.max_new_tokens=128",
    ]
    config = load_recipe("tiny", words).config
    console = SimpleNamespace(line=said.append)
    session: Any = SimpleNamespace(config=config, base=Source(config.model.base), console=console)
    _check_room(session, ["sft", "ppo"], compared=False)
    (line,) = said
    assert line.startswith("stage.ppo.max_new_tokens = 100 ")
    assert "cut to 28 tokens" in line
    assert "(data.max_prompt_length = 48)" in line
    line = line.replace(base.partition("=")[2], "BASE")
    prose.compare("runs/kinds_trained: prompts are cut to make room for replies", line)
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens = 128 leaves no room"):
        _check_room(session, ["sft"], compared=True)
