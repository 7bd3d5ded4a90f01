"""The published studies: what README and docs say of them is what their files hold."""

import json
from pathlib import Path
from typing import Any

import over_optimisation
import pytest

from preftune.study.page import study_text
from preftune.study.values import COLUMNS, read_seed
from preftune.world.dataset import world_hash

ROOT = Path(__file__).resolve().parent.parent
SETS = ("training", "combinations", "wording")


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "studies" / "quickstart" / "study.json").read_text(encoding="utf-8"))


def interval(of: dict[str, Any]) -> str:
    return f"{of['gold_gain']:+.2f} [{of['gold_gain_low']:+.2f}, {of['gold_gain_high']:+.2f}]"


@pytest.mark.parametrize("name", sorted(f.parent.name for f in (ROOT / "docs/studies").glob("*/study.json")))
def test_the_tables_of_a_published_page_are_of_its_numbers(name: str) -> None:
    """Files that call the score of the reward model proxy give pages that call it score."""
    file = ROOT / "docs" / "studies" / name / "study.json"
    study = json.loads(file.read_text(encoding="utf-8"))
    page = file.with_name("STUDY.md").read_text(encoding="utf-8")
    assert "proxy" not in page
    tables = [line for line in study_text(study).splitlines() if line.startswith("|")]
    assert "| n | KL (formula) | gold gain | score gain |" in tables
    assert [line for line in page.splitlines() if line.startswith("|")] == tables


def test_kept_seeds_of_before_are_read() -> None:
    seed = ROOT / "docs" / "studies" / "sentiment" / "seeds" / "seed-101"
    old = json.loads((seed / "ppo.json").read_text(encoding="utf-8"))["sets"]["test"]
    values = read_seed(seed / "seed.json", 101)
    assert values.policy("ppo", "test").score == tuple(old["proxy"])
    assert values.tables["ppo"]["test"][:, COLUMNS.index("score")].tolist() == old["proxy"]
    best = json.loads((seed / "best_of_n.json").read_text(encoding="utf-8"))["sets"]["test"]
    assert values.best["test"]["score"].tolist() == best["proxy"]


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "best_of_4", "ceiling"])
def test_the_table_in_the_readme_is_the_studys(study: dict[str, Any], name: str) -> None:
    policy = study["policies"][name]
    gains = [interval(policy["sets"][kind]) for kind in SETS]
    row = " | ".join([policy["label"], *gains, f"{policy['kl']:.2f}", f"{policy['eos_rate']:.3f}"])
    assert f"| {row} |" in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo"])
def test_the_algorithms_gain_in_every_seed_and_on_every_kind_of_prompt(
    study: dict[str, Any], name: str
) -> None:
    """What the README says in words, from the intervals over prompts of each seed and the pooled ones."""
    assert [seed["seed"] for seed in study["seeds"]] == [100, 101, 102, 103, 104]
    for kind in SETS:
        assert study["policies"][name]["sets"][kind]["gold_gain_low"] > 0
        for seed in study["seeds"]:
            assert seed["policies"][name]["sets"][kind]["gold_gain_low"] > 0
    for seed in study["seeds"]:
        own, sft = seed["policies"][name], seed["policies"]["sft"]
        assert own["kl"] < 20
        assert own["eos_rate"] >= 0.95
        assert own["repetition_4"] <= sft["repetition_4"] + 0.1


def test_at_equal_kl_none_is_told_apart_from_best_of_n(study: dict[str, Any]) -> None:
    for name in ("ppo", "grpo", "dpo"):
        assert study["policies"][name]["bon_kl_gain"]["verdict"] == "no detectable difference"


def test_it_is_of_the_world_that_ships(study: dict[str, Any]) -> None:
    assert study["world_sha256"] == world_hash()


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "best", "ceiling", "best_of_16"])
def test_the_table_of_sentiment_is_the_studys(name: str) -> None:
    place = ROOT / "docs" / "studies"
    policy = json.loads((place / "sentiment" / "study.json").read_text(encoding="utf-8"))["policies"][name]
    (other,) = policy["others"].values()
    confirmed = f"{other['gain']:+.3f} [{other['gain_low']:+.3f}, {other['gain_high']:+.3f}]"
    cells = [interval(policy), confirmed, f"{policy['kl']:.2f}"]
    if policy["text"] is not None:
        distinct, counts = policy["text"]["distinct_2_of_reference"], policy["text"]["counts"]
        cells += [f"{distinct:.2f}", "yes" if counts else "no"]
    rows = (place / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(row.startswith("|") and " | ".join(cells) in row for row in rows)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "ceiling"])
def test_what_top_1_costs_is_what_the_three_studies_say(study: dict[str, Any], name: str) -> None:
    names = ("quickstart-top1", "quickstart-top1-time")
    files = [ROOT / "docs" / "studies" / each / "study.json" for each in names]
    policies = [study["policies"][name]]
    policies += [json.loads(file.read_text(encoding="utf-8"))["policies"][name] for file in files]
    cells = [policies[0]["label"], *map(interval, policies), *(f"{each['gold']:.2f}" for each in policies)]
    rows = (ROOT / "docs" / "trainable.md").read_text(encoding="utf-8").splitlines()
    assert f"| {' | '.join(cells)} |" in rows


def test_the_table_of_the_frontier_is_the_studys() -> None:
    place = ROOT / "docs" / "studies"
    study = json.loads((place / "sentiment-frontier" / "study.json").read_text(encoding="utf-8"))
    text = (place / "README.md").read_text(encoding="utf-8").replace(" | not swept", "")
    assert len(study["frontier"]) == 4
    for row in study["frontier"]:
        reached = [at for at in row["at"] if at]
        gains = [f"{at['gain']:+.2f} [{at['gain_low']:+.2f}, {at['gain_high']:+.2f}]" for at in reached]
        assert f"| {row['method']} | {' | '.join(gains)}" in text


@pytest.mark.parametrize("name", ["sentiment", "sentiment-frontier"])
def test_kept_seeds_of_sentiment_hold_no_text(name: str) -> None:
    files = list((ROOT / "docs" / "studies" / name / "seeds").rglob("*.json"))
    assert files
    assert not any("response" in file.read_text(encoding="utf-8") for file in files)


def test_readme_says_of_sentiment_what_the_study_does() -> None:
    policies = json.loads((ROOT / "docs/studies/sentiment/study.json").read_text(encoding="utf-8"))[
        "policies"
    ]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(interval(policies[name]) in text for name in ("ppo", "dpo"))


def test_readme_says_of_hh_what_the_comparisons_of_both_untouched_seeds_do() -> None:
    """By its own reward model in means, by the second one with intervals."""
    folder = ROOT / "benchmarks" / "results" / "hh_smollm2"
    found = dict[tuple[int, str, str], dict[str, Any]]()
    for seed in (1, 2):
        for line in (folder / f"seed-{seed}-comparisons.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["reference"] == "policy_sft":
                found[seed, row["policy"], row["measure"]] = row
    own, other = ([found[seed, "policy_ppo", kind] for seed in (1, 2)] for kind in ("score", "held_out"))
    best = [found[seed, "best_of_4", "held_out"]["mean"] for seed in (1, 2)]

    def gain(row: dict[str, Any]) -> str:
        low, high = row["interval"]
        return f"{row['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"

    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"two seeds on which nothing was set, {own[0]['n']} prompts each" in readme
    assert f"PPO gains {own[0]['mean']:+.2f} and {own[1]['mean']:+.2f} standard deviations" in readme
    assert f"{gain(other[0])} at one seed and {gain(other[1])} at the other" in readme
    assert f"Best of 4 gains {best[0]:+.2f} and {best[1]:+.2f} by it" in readme
    assert f"nothing detectable ({gain(found[2, 'policy_dpo', 'held_out'])}, one seed)" in readme


def test_the_last_policies_of_over_optimisation_are_those_of_its_runs() -> None:
    results = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in over_optimisation.RESULTS.glob("*.json")
    }
    rows = over_optimisation.end_table(results).splitlines()[2:]
    assert len(rows) == 1 + len(results) == 4
    page = (ROOT / "docs" / "studies" / "README.md").read_text(encoding="utf-8").splitlines()
    assert set(rows) <= set(page)
