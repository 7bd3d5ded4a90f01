"""The published studies: what README and docs say of them is what their files hold."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import over_optimisation
import pytest

from preftune.study.beside import LEAST_DISTINCT, MOST_KL
from preftune.study.page import study_text
from preftune.study.places import conclusions
from preftune.study.values import COLUMNS, read_seed
from preftune.world.dataset import world_hash

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "src" / "preftune" / "recipes"
SETS = ("training", "combinations", "wording")
REPEATED = (102, 103, 104, 105)  # seeds of the study that the frontier has again, trained anew
SENTIMENT = ("sentiment", "sentiment-frontier", "sentiment-grpo", "sentiment-grpo-192")
KEPT = (  # what stands in a kept seed besides names of policies and hashes
    *("base", "best_of_n", "base_nll", "bytes", "content_sha256", "ended", "files", "gold"),
    *("distinct_2", "distinct_2_rarefied"),
    *("gold_apart", "gold_win", "golds", "judged_by", "key", "kl", "length", "pairs", "policies", "policy"),
    *("preftune.judges.reviews:liked", "preftune.judges.style:sentiment", "proxy", "record_sha256"),
    *("reference", "repetition_4", "reward_model", "rm", "score", "seconds", "seed", "sets", "sha256"),
    *("stages", "steps", "test", "tokens", "tokens_sampled", "tokens_trained", "train", "validation", "win"),
)


def test_the_index_leads_to_every_page_whose_numbers_it_gives() -> None:
    place = ROOT / "docs" / "studies"
    index = (place / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([a-z0-9-]+)\]\(\1\.md\) \| .* \| (.*) \|$", index, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(
        f.stem for f in place.glob("*.md") if f.stem != "README"
    )
    for name, answer in rows:
        page = " ".join((place / f"{name}.md").read_text(encoding="utf-8").split())
        assert all(share in page for share in re.findall(r"\d+\.\d %", answer))


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
    assert values.sets["ppo"]["test"].score == tuple(old["proxy"])
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


@pytest.mark.parametrize(
    ("study", "name"),
    [
        *(("sentiment", name) for name in ("ppo", "grpo", "dpo", "best", "ceiling", "best_of_16")),
        *(("sentiment-grpo", name) for name in ("grpo", "best_of_16")),
        ("sentiment-grpo-192", "grpo"),
    ],
)
def test_the_table_of_sentiment_is_the_studys(study: str, name: str) -> None:
    place = ROOT / "docs" / "studies"
    policy = json.loads((place / study / "study.json").read_text(encoding="utf-8"))["policies"][name]
    (other,) = policy["others"].values()
    confirmed = f"{other['gain']:+.3f} [{other['gain_low']:+.3f}, {other['gain_high']:+.3f}]"
    cells = [interval(policy), confirmed, f"{policy['kl']:.2f}"]
    if policy["text"] is not None:
        distinct, counts = policy["text"]["distinct_2_of_reference"], policy["text"]["counts"]
        cells += [f"{distinct:.2f}", "yes" if counts else "no"]
    rows = (place / "sentiment.md").read_text(encoding="utf-8").splitlines()
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
    text = (place / "sentiment.md").read_text(encoding="utf-8").replace(" | not swept", "")
    assert len(study["frontier"]) == 4
    for row in study["frontier"]:
        reached = [at for at in row["at"] if at]
        gains = [f"{at['gain']:+.2f} [{at['gain_low']:+.2f}, {at['gain_high']:+.2f}]" for at in reached]
        assert f"| {row['method']} | {' | '.join(gains)}" in text


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner)
    yield from value if isinstance(value, dict) else ()


@pytest.mark.parametrize("name", SENTIMENT)
def test_kept_seeds_of_sentiment_hold_no_text(name: str) -> None:
    """Names of policies, hashes, and keys of one short word."""
    place = ROOT / "docs" / "studies" / name
    files = list((place / "seeds").rglob("*"))
    assert {file.suffix for file in files if file.is_file()} == {".json"}
    policies = json.loads((place / "study.json").read_text(encoding="utf-8"))["policies"]
    for file in place.glob("seeds/*/*.json"):
        for found in strings(json.loads(file.read_text(encoding="utf-8"))):
            word = found.removesuffix(".json")
            assert word in {*policies, *KEPT} or re.fullmatch("[0-9a-f]{64}", found), (file, found)


def sevens(text: str) -> Iterator[tuple[str, ...]]:
    """All sequences of seven words, in small letters."""
    words = re.findall("[a-z']+", text.lower())
    return zip(*(words[i:] for i in range(7)), strict=False)


def test_nothing_published_of_sentiment_quotes_a_review(shared: Path) -> None:
    """Of the reviews that it was made of, which are no part of this project."""
    reviews = [shared / "data" / "imdb" / f"{split}.jsonl.gz" for split in ("train", "test")]
    if not all(file.is_file() for file in reviews):
        pytest.skip("no data/imdb in PREFTUNE_SHARED: the reviews that the study was made of")
    places = [ROOT / "docs" / "studies" / name for name in (*SENTIMENT, "sentiment-over-optimisation")]
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    files += [*over_optimisation.RESULTS.glob("*.json"), RECIPES / "sentiment.expected.json"]
    files += [*(ROOT / "docs" / "studies").glob("*.md"), RECIPES / "sentiment.toml"]
    ours = {seven for file in files for seven in sevens(file.read_text(encoding="utf-8"))}
    for file in reviews:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                assert ours.isdisjoint(sevens(json.loads(line)["text"])), f"{file}: row {number}"


@pytest.mark.parametrize("name", SENTIMENT)
def test_the_page_of_sentiment_is_its_json_in_words(name: str) -> None:
    """What a person concludes included, all of whose numbers the tables have."""
    place = ROOT / "docs" / "studies" / name
    study = json.loads((place / "study.json").read_text(encoding="utf-8"))
    page = (place / "STUDY.md").read_text(encoding="utf-8")
    assert page == study_text(study)
    assert study["conclusions"] == conclusions(place)
    assert study["command"].startswith("PREFTUNE_REVIEWS=PATH preftune study sentiment ")
    said = " ".join(study["conclusions"].split())
    tables = page.partition("## Test prompts")[2]
    numbers = re.findall(r"[+-]\d\.\d+(?: \[[^]]+\])?|\b\d+\.\d\d\b(?![^[]*\])", said)
    assert len(numbers) > 10
    assert all(number in tables for number in numbers)


def test_readme_says_of_sentiment_what_the_study_does() -> None:
    file = ROOT / "docs" / "studies" / "sentiment" / "study.json"
    study = json.loads(file.read_text(encoding="utf-8"))
    policies = study["policies"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ppo, grpo, dpo, best = (interval(policies[name]) for name in ("ppo", "grpo", "dpo", "best_of_16"))
    assert f"| film reviews, five seeds | {ppo} | {grpo}, too far | {dpo} | {best}, n = 16 |" in text
    assert [policies[name]["text"]["counts"] for name in ("ppo", "grpo", "dpo")] == [True, False, True]
    kept = policies["grpo"]["text"]["distinct_2_of_reference"]
    assert f"within {MOST_KL:g} nats of SFT and with {LEAST_DISTINCT} of its variety" in text
    assert f"GRPO kept {kept:.2f} of it" in text
    assert f"PPO kept {policies['ppo']['text']['distinct_2_of_reference']:.2f} of it, just enough" in text
    far = [seed["policies"]["grpo"]["kl"] for seed in study["seeds"]]
    assert sum(kl > MOST_KL for kl in far) == 1
    assert f"one seed went to {max(far):.1f} nats" in text


def test_readme_says_of_hh_scratch_what_its_files_do() -> None:
    numbers = json.loads((RECIPES / "hh-scratch.expected.json").read_text(encoding="utf-8"))["numbers"]
    gains = [sum(numbers[f"{name} gain"]) / 5 for name in ("PPO", "GRPO", "DPO")]
    assert all(min(numbers[f"{name} gain"]) > 0 for name in ("PPO", "GRPO", "DPO"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = f"gains {min(gains):+.2f} to {max(gains):+.2f} by its own reward model (means of five seeds)"
    assert f"{said}; by a second one no effect is detected (two seeds" in text
    study = json.loads((ROOT / "docs/studies/hh-scratch/study.json").read_text(encoding="utf-8"))
    assert len(study["seeds"]) == 2
    verdicts = {study["policies"][name]["gold_verdict"] for name in ("ppo", "grpo", "dpo")}
    assert verdicts == {"no detectable difference"}


def test_what_a_seed_of_sentiment_took_is_said_as_it_is_kept() -> None:
    place = ROOT / "docs" / "studies"
    files = place.glob("sentiment/seeds/*/seed.json")
    took = sorted(json.loads(file.read_text(encoding="utf-8"))["seconds"] / 60 for file in files)
    *most, last = (f"{minutes:.0f}" for minutes in took)
    page = " ".join((place / "sentiment.md").read_text(encoding="utf-8").split())
    assert f"The seeds took {', '.join(most)} and {last} minutes by the clock" in page
    assert [minutes < 120 for minutes in took] == [True] * 4 + [False]
    assert "four of five kept within the 2 hours" in page


def test_the_ranges_of_the_frontier_are_those_of_its_policies() -> None:
    place = ROOT / "docs" / "studies"
    study = json.loads((place / "sentiment-frontier" / "study.json").read_text(encoding="utf-8"))
    page = " ".join((place / "sentiment.md").read_text(encoding="utf-8").split())
    for name in ("dpo", "ppo", "grpo"):
        kls = [p["kl"] for key, p in study["policies"].items() if key.partition("-")[0] == name]
        assert len(kls) == 3
        assert re.search(rf"{name.upper()} from {min(kls):.2f} to {max(kls):.2f}\b", page)


def test_the_intervals_said_of_the_frontier_are_those_of_its_tables() -> None:
    place = ROOT / "docs" / "studies"
    text = (place / "sentiment.md").read_text(encoding="utf-8")
    section = " ".join(text.partition("\n## The frontier")[2].partition("\n## ")[0].split())
    tables = (place / "sentiment-frontier" / "STUDY.md").read_text(encoding="utf-8")
    said = re.findall(r"[-+]\d\.\d+ \[[-+]\d\.\d+, [-+]\d\.\d+\]", section)
    assert len(said) > 15
    assert [each for each in said if each not in tables.partition("## Test prompts")[2]] == []
    files = [place / "sentiment-frontier" / "seeds" / f"seed-{seed}" / "seed.json" for seed in REPEATED]
    took = [json.loads(file.read_text(encoding="utf-8"))["seconds"] / 60 - 120 for file in files]
    *most, last = (f"2 h {minutes:.0f}" for minutes in took)
    assert f"took {', '.join(most)} and {last} min, one thread" in section


@pytest.mark.parametrize("name", ["ppo", "grpo-kl_coef-0_2", "dpo", "dpo-beta-0_01"])
def test_what_both_judges_confirm_at_all_seeds_of_the_frontier_is_confirmed(name: str) -> None:
    file = ROOT / "docs" / "studies" / "sentiment-frontier" / "STUDY.md"
    study = json.loads(file.with_name("study.json").read_text(encoding="utf-8"))
    policy = study["policies"][name]
    (other,) = policy["others"].values()
    assert policy["text"]["counts"]
    assert min(policy["gold_gain_low"], other["gain_low"]) > 0
    beside = file.read_text(encoding="utf-8").partition("\n## Beside gold")[2].partition("\n## ")[0]
    (row,) = (line for line in beside.splitlines() if line.startswith(f"| {policy['label']} | "))
    assert "| 5 of 5; 5 of 5 |" in row


def test_a_repeated_seed_is_said_to_differ_as_it_does() -> None:
    """Of the study and of the frontier: SFT's gold is the same, what comes after is not."""
    place = ROOT / "docs" / "studies"
    page = " ".join((place / "sentiment.md").read_text(encoding="utf-8").split())
    again, before = (
        {
            seed["seed"]: seed["policies"]
            for seed in json.loads((place / name / "study.json").read_text(encoding="utf-8"))["seeds"]
        }
        for name in ("sentiment-frontier", "sentiment")
    )
    assert all(again[seed]["sft"]["gold"] == before[seed]["sft"]["gold"] for seed in REPEATED)

    def gains(of: dict[int, Any], name: str) -> str:
        *most, last = (f"{of[seed][name]['gold_gain']:+.2f}" for seed in REPEATED)
        return f"{', '.join(most)} and {last}"

    for name in ("ppo", "grpo", "dpo"):
        assert f"{name.upper()} {gains(again, name)} where it was {gains(before, name)}" in page


def test_the_confirmation_of_over_optimisation_is_said_from_its_peak_on() -> None:
    page = " ".join((ROOT / "docs" / "studies" / "sentiment.md").read_text(encoding="utf-8").split())
    for name, words in (
        ("one", "{} ± {} at 47 nats to between {} and {} at all seven later points"),
        ("mean-sd", "{} ± {} at 47 to between {} and {} (lowest at 75"),
    ):
        steps = json.loads((over_optimisation.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["steps"]
        course = over_optimisation.Course(steps)
        means, reach = course.binned("rewards/liked/mean"), course.reach("rewards/liked/std")
        peak = int(means.argmax())
        later = means[peak + 1 :]
        assert round(course.binned("objective/kl")[peak]) == 47
        assert len(later) == 7
        ends = (means[peak], reach[peak], later.min(), later.max())
        assert words.format(*(f"{end:.3f}" for end in ends)) in page


def against_sft(seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Comparisons with SFT of a whole evaluation of hh-smollm2, by policy and measure."""
    file = ROOT / "benchmarks" / "results" / "hh_smollm2" / f"seed-{seed}-comparisons.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {(row["policy"], row["measure"]): row for row in rows if row["reference"] == "policy_sft"}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_readme_says_of_hh_what_the_comparisons_of_the_untouched_seeds_do(seed: int) -> None:
    """By the second reward model, from which no policy learnt."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = against_sft(seed)
    cells = [f"HH, seed {seed}"]
    for name in ("policy_ppo", "policy_grpo", "policy_dpo", "best_of_4"):
        row = rows[name, "held_out"]
        low, high = row["interval"]
        cells.append(f"{row['mean']:+.2f} [{low:+.2f}, {high:+.2f}]")
    if seed == 1:
        cells[3] = ""  # its DPO learnt from collected pairs
    said = [" ".join(["|", *cell.split(), ""]) for cell in [*cells[:-1], f"{cells[-1]}, n = 4"]]
    assert "".join([*said, "|"]) in readme


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_gains_of_hh_smollm2_are_those_of_its_comparisons(seed: int) -> None:
    page = (ROOT / "docs" / "studies" / "hh-smollm2.md").read_text(encoding="utf-8").splitlines()
    names = {"PPO": "policy_ppo", "GRPO": "policy_grpo", "best of 4": "best_of_4", "the base": "base"}
    rows, seen = against_sft(seed), 0
    for label, of, *cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in page if "|" in line
    ):
        if len(cells) != 6 or of != str(seed):
            continue
        score, held_out = (rows[names.get(label, "policy_dpo"), kind] for kind in ("score", "held_out"))
        gains = [(row["mean"], *row["interval"]) for row in (score, held_out)]
        wins = [100 * share for share in (held_out["win_rate"]["value"], *held_out["win_rate"]["interval"])]
        expected = [f"{mean:+.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in gains]
        assert cells[:3] == [*expected, "{:.0f} % [{:.0f}, {:.0f}]".format(*wins)], label
        seen += 1
    assert seen == 5


def test_the_last_policies_of_over_optimisation_are_those_of_its_runs() -> None:
    results = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in over_optimisation.RESULTS.glob("*.json")
    }
    rows = over_optimisation.end_table(results).splitlines()[2:]
    assert len(rows) == 1 + len(results) == 4
    page = (ROOT / "docs" / "studies" / "sentiment.md").read_text(encoding="utf-8").splitlines()
    assert set(rows) <= set(page)


def test_readme_says_of_grpo_within_the_limits_what_its_studies_do() -> None:
    place = ROOT / "docs" / "studies"
    frontier, before, again = (
        json.loads((place / name / "study.json").read_text(encoding="utf-8"))
        for name in ("sentiment-frontier", "sentiment-grpo", "sentiment-grpo-192")
    )
    grpo, text = (
        frontier["policies"]["grpo-kl_coef-0_2"],
        " ".join((ROOT / "README.md").read_text("utf-8").split()),
    )
    assert grpo["text"]["counts"]
    assert len(frontier["seeds"]) == 5
    assert f"it keeps the limits ({interval(grpo)}, five seeds)" in text
    (other,) = grpo["others"].values()
    agrees = f"{other['gain']:+.3f} [{other['gain_low']:+.3f}, {other['gain_high']:+.3f}]"
    assert f"a second judge agrees ({agrees}; for four other models" in text
    assert again["n_prompts"] == 4 * before["n_prompts"]
    others = (study["policies"]["grpo"]["others"] for study in (before, again))
    assert [other["gain_low"] > 0 for of in others for other in of.values()] == [False, True]


def test_the_page_says_of_the_validation_files_what_their_results_do() -> None:
    folder = ROOT / "benchmarks" / "results" / "hh_smollm2"
    page = " ".join((ROOT / "docs" / "studies" / "hh-smollm2.md").read_text(encoding="utf-8").split())
    cells: dict[str, list[str]] = {}
    rows = (folder / "seed-3-validation-comparisons.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        if row["reference"] == "policy_sft":
            low, high = row["interval"]
            cells.setdefault(row["policy"], []).append(f"{row['mean']:+.2f} [{low:.2f}, {high:.2f}]")
    assert len(cells) == 5
    assert all(f"| {' | '.join(cell)} |" in page for cell in cells.values())
    file = folder / "seed-3-validation-preference.json"
    for numbers in json.loads(file.read_text(encoding="utf-8"))["preference"].values():
        share = numbers["accuracy"]
        low, high = (100 * end for end in share["interval"])
        assert f"{100 * share['value']:.1f} % [{low:.1f}, {high:.1f}]" in page
        assert f"of those {share['n']:,} pairs" in page


def test_the_page_says_of_kinds_of_prompt_what_their_results_do() -> None:
    file = ROOT / "benchmarks" / "results" / "hh_smollm2" / "seed-3-by-prompt.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    page = (ROOT / "docs" / "studies" / "hh-smollm2.md").read_text(encoding="utf-8").splitlines()
    by_source: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "source":
            by_source.setdefault(row["of"], {})[row["policy"]] = row
    assert sum(groups["base"]["n"] for groups in by_source.values()) == 128
    assert by_source.pop("helpful-online")["base"]["n"] == 4  # "the four are left out"
    for source, groups in by_source.items():
        gains = [groups[name]["held_out"] for name in ("policy_ppo", "policy_grpo", "policy_dpo", "base")]
        cells = [f"{g['mean']:+.2f} [{g['interval'][0]:.2f}, {g['interval'][1]:.2f}]" for g in gains]
        assert f"| `{source}` | {groups['base']['n']} | {' | '.join(cells)} |" in page
    names = ("policy_ppo", "policy_grpo", "policy_dpo", "base")
    cells = [(row["of"], row["policy"], row["held_out"]) for row in rows if row["policy"] in names]
    shown = {(of, policy) for of, policy, gain in cells if gain["p_holm"] < 0.05 and of != "1"}
    single, harmless = by_source["helpful-single-turn-extra"], by_source["harmless-base"]
    assert shown == {("helpful-single-turn-extra", name) for name in names if name != "policy_grpo"}
    assert all(single[name]["held_out"]["interval"][0] > 0 for name in names)
    assert round(single["policy_grpo"]["held_out"]["p_holm"], 2) == 0.08
    assert harmless["base"]["held_out"]["interval"][1] < 0
    assert all(harmless[name]["held_out"]["interval"][0] > 0 for name in ("policy_ppo", "policy_grpo"))


def test_the_page_says_of_other_settings_of_grpo_what_they_gave() -> None:
    place = ROOT / "docs" / "studies"
    page = (place / "sentiment.md").read_text(encoding="utf-8")
    file = place / "sentiment-grpo" / "tries.jsonl"
    tries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in tries:
        first, last = row["seeds"][0], row["seeds"][-1]
        cells = [f"`{row['changed']}`", str(first) if first == last else f"{first} to {last}"]
        for name, digits in (("gold", 2), ("confirmation", 3)):
            value, low, high = (f"{number:+.{digits}f}" for number in row[name])
            cells.append(f"{value} [{low}, {high}]")
        within = "yes" if row["counts"] else "no"
        assert f"| {' | '.join(cells)} | {row['kl']:.2f} | {row['distinct_2']:.2f} | {within} |" in page
        assert row["counts"] == (row["kl"] <= 10 and row["distinct_2"] >= 0.9)
    seeds = tries[-1]["by_seed"]
    assert [row["seed"] for row in seeds] == tries[-1]["seeds"] == [102, 103, 104, 105]
    for name, form in (("distinct_2", ".2f"), ("kl", ".1f"), ("confirmation", "+.3f")):
        *several, one = (format(row[name], form) for row in seeds)
        assert f"{', '.join(several)} and {one}" in page
    by_kl = [format(row["gold"], "+.2f") for row in sorted(seeds, key=lambda row: row["kl"])]
    assert f"{', '.join(by_kl)} in the order of KL" in " ".join(page.split())
    assert by_kl == sorted(by_kl)  # "gold rises with KL"
    assert sum(row["distinct_2"] < 0.9 for row in seeds) == 2  # "does not at two of the next four seeds"
