"""What evaluation writes for report, study and comparison: by prompt, against people, at equal length."""

import pytest
import yaml
from huggingface_hub import ModelCard

import preftune
from preftune.config import load_recipe
from preftune.evaluation import stats
from preftune.evaluation.summary import prompt_id
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.plan import comparisons
from preftune.runs.sources import dataset_of

POLICIES = ["base", "policy_sft", "policy_ppo", "policy_grpo", "policy_dpo", "best_of_4"]


def test_numbers_by_prompt_add_up_to_the_summary(tiny_run: RunDir) -> None:
    prompts = None
    for name in POLICIES:
        record = read_json(tiny_run.evaluation(name))
        rows = record["prompts"]
        prompts = prompts or [row["prompt"] for row in rows]
        assert [row["prompt"] for row in rows] == prompts
        assert record["score"]["mean"] == pytest.approx(sum(row["score"] for row in rows) / 16)
        assert record["gold"]["mean"] == pytest.approx(sum(row["gold"] for row in rows) / 16)
        assert record["eos_rate"]["value"] == sum(row["ended"] for row in rows) / 16
        if name != "best_of_4":
            reverse = record["kl"]["reverse_per_sequence"]["mean"]
            assert reverse == pytest.approx(sum(row["reverse_kl"] for row in rows) / 16)
            assert (reverse == 0) == (name == "policy_sft")
    samples = read_jsonl(tiny_run.samples_file("policy_ppo"))
    assert [prompt_id(row["prompt"]) for row in samples] == (prompts or [])[:5]


def test_the_human_chosen_response_is_scored_like_any_other(tiny_run: RunDir) -> None:
    model = preftune.load_reward_model(tiny_run.models / "reward_model")
    record = read_json(tiny_run.evaluation("policy_ppo"))
    test = dataset_of(load_recipe("tiny", []).config.data, 0).test
    replies: dict[str, list[str]] = {}
    for pair in test:
        replies.setdefault(prompt_id(pair.prompt.transcript()), []).append(pair.chosen)
    prompts = {prompt_id(pair.prompt.transcript()): pair.prompt.transcript() for pair in test}
    for row in record["prompts"]:
        known = replies[row["prompt"]]  # one prompt may have several
        scores = model.score([prompts[row["prompt"]]] * len(known), known).tolist()
        assert min(abs(row["chosen_score"] - score) for score in scores) < 1e-3
    wins = [(row["score"], row["chosen_score"]) for row in record["prompts"]]
    rate = stats.win_rate(*zip(*wins, strict=True))
    assert record["win_rate_vs_chosen"]["value"] == pytest.approx(rate)


def test_holm_is_taken_over_each_family(tiny_run: RunDir) -> None:
    records = read_jsonl(tiny_run.comparisons)
    families: dict[str, list[dict]] = {}
    for record in records:
        assert record["family"] == f"{record['measure']} vs {record['reference']}"
        families.setdefault(record["family"], []).append(record)
    assert {"score vs policy_sft", "gold vs policy_sft", "score vs best_of_4", "score vs chosen"} <= set(
        families
    )
    for family in families.values():
        assert [r["p_holm"] for r in family] == stats.holm([r["p_value"] for r in family])
    assert len(families["score vs chosen"]) == len(POLICIES)
    assert len(families["score vs policy_sft"]) == comparisons(load_recipe("tiny").config)


def test_length_control_is_there_for_all_but_the_reference(tiny_run: RunDir) -> None:
    for name in POLICIES:
        record = read_json(tiny_run.evaluation(name))
        controlled = record["length_controlled"]
        assert (controlled is None) == (name == "policy_sft")
        if controlled:
            low, high = controlled["win_rate"]["interval"]
            assert low <= controlled["win_rate"]["value"] <= high


def test_the_audit_is_complete(tiny_run: RunDir) -> None:
    record = read_json(tiny_run.reward_evaluation)
    assert record["invariance"]["ok"] is True
    assert [row["name"] for row in record["sanity"]][:2] == ["chosen", "rejected"]
    assert sum(each["n"] for each in record["by_length_difference"]) == record["n"]
    assert sum(each["n"] for each in record["by_turns"].values()) == record["n"]
    assert sum(each["n"] for each in record["reliability"]) == record["n"]
    assert record["expected_band"]["high"] == record["best_reachable"]
    rows = read_jsonl(tiny_run.mistakes)
    assert record["n_mistakes"] == len(rows)
    assert all("tokens_chosen" in row for row in rows[:200])
    assert not any("tokens_chosen" in row for row in rows[200:])
    for row in rows[:50]:
        for side in ("chosen", "rejected"):
            assert row[f"tokens_{side}"][-1][1] == pytest.approx(row[f"reward_{side}"], abs=1e-4)
            assert "".join(text for text, _ in row[f"tokens_{side}"][:-1]) == row[side]
    tagged = record["mistake_tags"]["rejected is longer"]
    assert tagged["mistakes"] == sum("rejected is longer" in row["tags"] for row in rows)


@pytest.mark.parametrize(
    "name", ["base", "policy_sft", "policy_ppo", "policy_grpo", "policy_dpo", "reward_model"]
)
def test_every_card_has_metadata_and_the_measured_numbers(tiny_run: RunDir, name: str) -> None:
    card = ModelCard.load(tiny_run.models / name / "README.md")  # the hub's own reader
    text = (tiny_run.models / name / "README.md").read_text(encoding="utf-8")
    meta = yaml.safe_load(text.split("---")[1])
    for parsed in (card.data.to_dict(), meta):
        assert parsed["library_name"] == "transformers"
    assert meta["pipeline_tag"] == ("text-classification" if name == "reward_model" else "text-generation")
    metrics = {m["type"]: m["value"] for m in meta["model-index"][0]["results"][0]["metrics"]}
    if name == "reward_model":
        record = read_json(tiny_run.reward_evaluation)
        accuracy = record["accuracy"]
        assert f"| {record['brier']:.3f} [{record['brier_interval'][0]:.3f}, " in text
        assert f"(by chance alone up to {record['ece_if_calibrated']:.3f})" in text
        assert metrics["accuracy"] == pytest.approx(accuracy["value"], abs=1e-4)
        assert f"{accuracy['value']:.3f} [{accuracy['interval'][0]:.3f}" in text
        assert "TRL's trainers drop it" in text
    else:
        score = read_json(tiny_run.evaluation(name))["score"]
        assert metrics["score"] == pytest.approx(score["mean"], abs=1e-4)
        assert f"[{score['interval'][0]:.3f}, {score['interval'][1]:.3f}] | 16 |" in text
    for heading in ("Data", "Recipe", "Measured", "Limits", "How to load"):
        assert f"\n## {heading}\n" in text


def test_the_record_says_what_scored_and_whose_models_all_numbers_hang_on(tiny_run: RunDir) -> None:
    record = read_json(tiny_run.stage_json("evaluation"))
    assert record["judged_by"] == {"judge": "rm", "key": read_json(tiny_run.stage_json("rm"))["key"]}
    assert record["shared"] == ["sft", "rm"]
