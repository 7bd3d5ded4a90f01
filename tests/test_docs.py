"""The documentation against the code: references exist; metrics, defaults and exit codes are what it says."""

import ast
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trunk_table
from pydantic_core import PydanticUndefined

import preftune
import tiny
from preftune import errors
from preftune.config import ALGORITHM_CONFIGS, EvaluationConfig, load_recipe
from preftune.data import Dialogue, Preference, Turn
from preftune.evaluation.baselines import power
from preftune.evaluation.compare import compare_to
from preftune.evaluation.mistakes import mistakes
from preftune.evaluation.policy import Conditions
from preftune.evaluation.reward_model import examine, gap
from preftune.evaluation.summary import summarise
from preftune.models.roles import Reference
from preftune.rundir import read_jsonl
from preftune.training.learner import Learner
from preftune.training.loop import Plan, train

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SETTINGS = EvaluationConfig(resamples=20)


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, methods and assigned names of a Python file, methods and fields as Class.name."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def tables(page: Path) -> dict[str, list[list[str]]]:
    """Rows of the Markdown tables under each second-level heading, the heads of the tables included."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        elif line.startswith("| "):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found.setdefault(heading, []).append([cell.strip() for cell in cells])
    return found


def first_column(page: Path, heading: str) -> set[str]:
    """The names in code spans in the first column of the table under `heading`."""
    return {name for row in tables(page)[heading] for name in re.findall(r"`([^`]+)`", row[0])}


# --- references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_every_reference_exists(page: Path) -> None:
    wrong = []
    for path, name in re.findall(r"([\w./-]+\.py)::([\w.]+)", page.read_text(encoding="utf-8")):
        file = ROOT / path
        if not file.is_file():
            wrong.append(f"{path} is not there")
        elif name.rstrip(".") not in names_in(file):
            wrong.append(f"{path} has no {name}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    wrong = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not wrong


def test_a_wrong_reference_is_noticed() -> None:
    names = names_in(ROOT / "src/preftune/algorithms/ppo.py")
    assert {"PPO", "PPO.step", "PPO.needs", "Experience.returns"} <= names
    assert "PPO.train" not in names


def test_the_figures_of_shared_trunks_are_those_on_record() -> None:
    page = (ROOT / "docs" / "trainable.md").read_text(encoding="utf-8")
    assert f"{trunk_table.BEGIN}\n{trunk_table.table()}{trunk_table.END}" in page


def test_what_a_second_process_brings_is_what_is_on_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "processes.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")

    def cell(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} ({values['lowest']:.2f} to {values['highest']:.2f})"

    shapes = [each for name, each in record["clock"].items() if name.endswith(("_whole", "_parts"))]
    gains = [f"{cell(each['gain'])} | {cell(each['over_products'])} |" for each in shapes if "gain" in each]
    assert len(gains) == 5
    assert all(gain in page for gain in gains)
    assert f"n = {record['n']}, medians (lowest to highest), by the clock" in " ".join(page.split())


# --- metrics ------------------------------------------------------------------------------------------------

METRICS = ROOT / "docs" / "metrics.md"


@pytest.mark.parametrize("algorithm", ALGORITHM_CONFIGS)
def test_training_metrics_are_documented(algorithm: str) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)

    made = preftune.one_update(
        algorithm, tiny.roles(algorithm), tiny.batch_for(algorithm), optimizer=optimizer, microbatch_size=4
    )
    assert set(made) == first_column(METRICS, algorithm)


def test_metrics_of_the_loop_are_documented(tmp_path: Path) -> None:
    plan = Plan(
        steps=1, metrics=tmp_path / "m.jsonl", checkpoints=tmp_path / "none", checkpoint_every=1, keep=1
    )
    algorithm = SimpleNamespace(step=lambda batch: {})
    train(algorithm, Learner(), lambda step: None, plan, lambda step, metrics: None)  # type: ignore[arg-type]
    (row,) = read_jsonl(plan.metrics)
    assert set(row) == first_column(METRICS, "stages/STAGE/metrics.jsonl: every stage")


def preference(row: int) -> Preference:
    prompt = Dialogue((Turn("human", f" Question {row}?"),))
    return Preference(prompt=prompt, chosen=" Yes.", rejected=" No, no.", source="here", row=row)


def conditions() -> Conditions:
    """Two prompts and a policy of a few thousand weights; texts are not looked at."""
    encoder = SimpleNamespace(
        ends=(tiny.EOS,),
        decode=str,
        readable_prompt=str,
        prompts=lambda dialogues, seeds: tiny.prompts(1, len(dialogues)),
    )
    scorer = SimpleNamespace(
        scored=lambda sequences, rows=(): (
            torch.arange(len(sequences)).float(),
            torch.ones(3, len(sequences)),
            {},
        )
    )
    return Conditions(
        prompts=[preference(0), preference(1)],
        encoder=encoder,  # type: ignore[arg-type]
        scorer=scorer,  # type: ignore[arg-type]
        reference=Reference(tiny.causal_lm(1)),
        settings=EvaluationConfig(resamples=20, max_new_tokens=4),
        seed=0,
        device=torch.device("cpu"),
        gold=lambda prompt, response, ended: 1.0,
    )


def test_numbers_about_policies_are_documented() -> None:
    measured = conditions()
    rows = measured.rows(measured.reference, lambda n: None)
    summary = summarise("policy_sft", "SFT", rows, measured)
    assert set(summary) == first_column(METRICS, "evaluation/POLICY.json")
    text = json.dumps(tables(METRICS)["evaluation/POLICY.json"])
    assert all(f"`{name}`" in text for name in summary["kl"])
    comparisons = compare_to("policy_sft", {"policy_sft": rows, "base": rows}, SETTINGS, seed=0)
    assert set(comparisons[0]) == first_column(METRICS, "evaluation/comparisons.jsonl")
    assert set(rows[0]) - {"ids"} == first_column(METRICS, "samples/POLICY_samples.jsonl")


def test_numbers_about_the_reward_model_are_documented() -> None:
    scored = [
        {
            "pair": preference(i),
            "chosen": 0.1 * i,
            "rejected": 0.2,
            "chosen_length": 3 + i,
            "rejected_length": 4,
            "chosen_members": [0.1, 0.2],
            "rejected_members": [0.2, 0.1 * i],
        }
        for i in range(5)
    ]
    assert set(examine("rm", scored, seed=0)) == first_column(METRICS, "evaluation/reward_model.json")
    assert "`gap_sd`" in json.dumps(tables(METRICS)["evaluation/reward_model.json"])
    assert set(gap(scored)) == {"value", "interval", "n", "gap_sd"}
    documented = tables(METRICS)["analysis/reward_model_mistakes.jsonl"]
    assert set(mistakes(scored)[0]) == {re.findall(r"`([^`]+)`", row[0])[0] for row in documented[1:]}


# --- defaults and exit codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHM_CONFIGS)
def test_defaults_on_the_page_of_an_algorithm_are_those_of_the_code(algorithm: str) -> None:
    _, *rows = tables(ROOT / "docs" / "algorithms" / f"{algorithm}.md")["Defaults"]
    written = {row[0].strip("`"): row[1].strip("`") for row in rows}
    fields = ALGORITHM_CONFIGS[algorithm].model_fields
    assert set(written) == set(fields) - {"algorithm", "optimizer", "data", "trainable", "rounds"}
    for key, text in written.items():
        assert fields[key].default is not PydanticUndefined
        assert (None if text == "none" else json.loads(text)) == fields[key].default, key


def test_exit_codes_are_those_of_the_errors() -> None:
    _, *rows = tables(ROOT / "docs" / "reliability.md")["Exit codes"]
    written = {row[1].strip("`"): int(row[0]) for row in rows if row[1].startswith("`")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert written == {kind.__name__: kind.code for kind in kinds}  # type: ignore[attr-defined]


def test_the_budgets_for_own_data_are_those_of_the_code() -> None:
    """Steps from the recipes' batches, what is detectable from the numbers of held-out pairs and prompts."""
    _, *rows = tables(ROOT / "docs" / "own-data.md")["Budgets"]
    commands = re.findall(r"^preftune run (\S+) (.*) --out runs/mine\d+$", own_data(), re.M)
    assert len(rows) == len(commands) == 3
    for row, (recipe, words) in zip(rows, commands, strict=True):
        train_pairs, validation, _ = (int(cell.replace(",", "")) for cell in row[1].split("/"))
        config = load_recipe(recipe, words.split()).config
        stages, n = [config.stage[name] for name in ("sft", "rm", "dpo")], config.evaluation.prompts
        steps = ", ".join(
            str(stage.model_copy(update={"rows": None}).steps_on(train_pairs)) for stage in stages
        )
        assert row[2] == f"{steps} of {stages[0].batch_size}"
        assert float(row[4]) == pytest.approx(power(0.6, validation, [])["chance"]["detectable"], abs=0.005)
        assert float(row[5]) == pytest.approx((1.96 + 0.8416) / n**0.5, abs=0.005)


def own_data() -> str:
    return (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")


def test_the_page_about_size_is_of_this_tree() -> None:
    """Each part within a twelfth of what the page says, every room in one of them, and the whole."""
    text = (ROOT / "docs" / "decisions" / "size.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "preftune"

    def lines(place: Path) -> int:
        return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in place.rglob("*.py"))

    rows = re.findall(r"^\| [^|]+ \| ([a-z`, ]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    named = [re.findall("`([a-z]+)`", rooms) for rooms, _ in rows]
    assert sorted(room for rooms in named for room in rooms) == sorted(
        place.name for place in package.iterdir() if (place / "__init__.py").is_file()
    )
    for rooms, (_, said) in zip(named, rows, strict=True):
        assert sum(lines(package / room) for room in rooms) == pytest.approx(
            int(said.replace(",", "")), rel=1 / 12
        )
    (whole,) = re.findall(r"has about ([\d,]+) lines", text)
    assert lines(package) == pytest.approx(int(whole.replace(",", "")), rel=0.03)
