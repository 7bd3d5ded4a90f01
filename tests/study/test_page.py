"""What STUDY.md says in words, and which rows its tables have."""

import json
from pathlib import Path

import pytest

import prose
from preftune.config import load_recipe
from preftune.runs.inputs import variables
from preftune.study.design import Design
from preftune.study.former import todays_words
from preftune.study.page import _best_of_n, _other_judges, study_text
from preftune.study.places import conclusions
from preftune.study.pool import _others_seen

JUDGES = "evaluation.gold=preftune.judges.style:sentiment, preftune.judges.reviews:liked"
TAUGHT = "stage.ceiling.reward_functions=preftune.judges.reviews:liked"
LABELLED = ["stage.pairs.algorithm=collect", "stage.pairs.judge=preftune.judges.reviews:liked"]


SAYS = {
    "pairs": "The pairs of stage pairs were labelled by {0}: {0} is no check on what learnt from these.",
    "ceiling": "Stage ceiling was trained on {0}: {0} is no check on it.",
    "pairs, ceiling": "The pairs of stage pairs were labelled by {0}, and stage ceiling was trained on {0}: "
    "{0} is no check on what learnt from these.",
    "": "No training saw the other judges.",
    "ceiling, grpo": "Stages grpo and ceiling were trained on {0}: {0} is no check on them.",
}


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ([], ""),  # the recipe's ceiling is trained on gold itself
        ([TAUGHT], "ceiling"),
        (LABELLED, "pairs"),
        ([*LABELLED, TAUGHT], "pairs, ceiling"),
        ([TAUGHT, TAUGHT.replace("ceiling", "grpo"), "stage.grpo.reward_model=none"], "ceiling, grpo"),
    ],
)
def test_judges_that_training_saw_are_not_said_to_be_unseen(words: list[str], stages: str) -> None:
    config = load_recipe("sentiment", ["data.name=x", JUDGES, *words]).config
    design = Design(
        config=config,
        recipe="sentiment",
        overrides=(),
        recipe_stages=tuple(config.stage),
        tokens=None,
        sweeps={},
        fresh_pairs=20,
        replies=2,
    )
    seen = _others_seen(design)
    policy = {
        "label": "PPO",
        "others": {},
        "kl": 1.0,
        "gold_gain": 0.1,
        "gold_gain_low": 0,
        "gold_gain_high": 1,
    }
    policy["text"] = {"distinct_2_of_reference": 1.0, "perplexity_of_reference": 1.0, "counts": True}
    page = _other_judges({"policies": {"ppo": policy}, "main_set": "test", "seeds": [], **seen})
    assert f"On the test prompts. {SAYS[stages].format('preftune.judges.reviews:liked')} A gain" in page
    assert "distinct-2 of all replies" in page
    policy["text"]["distinct_2_replies"] = 192
    page = _other_judges({"policies": {"ppo": policy}, "main_set": "test", "seeds": [], **seen})
    assert "distinct-2 of at most 192 replies" in page


def test_a_study_of_before_gets_todays_keys_and_stages_keep_their_names() -> None:
    old = {
        "policies": {"proxy": {"proxy": 1, "proxy_gain_low": [{"proxy_verdict": None}]}},
        "others_seen": {"proxy": ["own:proxy"]},
        "sweep": {"laws": {"rl_proxy": None, "bon_proxy": None}},
        "proxy_statement": "proxy",
        "reproxy": 1,
    }
    new = {
        "policies": {"proxy": {"score": 1, "score_gain_low": [{"score_verdict": None}]}},
        "others_seen": {"proxy": ["own:proxy"]},
        "sweep": {"laws": {"rl_score": None, "bon_score": None}},
        "score_statement": "proxy",
        "reproxy": 1,
    }
    assert todays_words(old) == todays_words(new) == new


def test_best_of_n_is_shown_up_to_the_last_n() -> None:
    numbers = {f"{gain}{end}": 0.1 for gain in ("gold_gain", "score_gain") for end in ("", "_low", "_high")}
    for pool in (3, 16, 20, 64):
        page = _best_of_n({"best_of_n": [{"n": n, "kl": 1.0, **numbers} for n in range(1, pool + 1)]})
        assert page.splitlines()[-1].startswith(f"| {pool} |")


def test_what_a_person_concludes_is_on_the_page(tmp_path: Path) -> None:
    first, second = tmp_path / "study", tmp_path / "published"
    for directory in (first, second):
        directory.mkdir()
    assert conclusions(first, second) is None
    (second / "CONCLUSIONS.md").write_text("\nWords\u202e of a person.\n" + "x" * 9000)
    said = conclusions(first, second)
    assert said is not None
    assert said.startswith("Words\u27e8U+202E\u27e9 of a person.\nxxx")
    assert said.endswith("more characters)")
    assert len(said) < 6100
    (first / "CONCLUSIONS.md").write_text("Nearer.")
    assert conclusions(first, second) == "Nearer."
    file = Path(__file__).parents[2] / "docs" / "studies" / "sentiment" / "study.json"
    study = json.loads(file.read_text(encoding="utf-8"))
    head, _, rest = study_text({**study, "conclusions": "Nearer."}).partition("\n\nNearer.\n\n")
    heading, _, above = head[head.index("## Conclusions") :].partition("\n\n")
    assert heading == "## Conclusions"
    prose.compare("study/page: above the conclusions", above)
    assert rest.startswith("## Test prompts")
    assert "Conclusions" not in study_text({**study, "conclusions": None})


@pytest.mark.parametrize(("value", "word"), [(None, "PATH"), ("my reviews", "'my reviews'")])
def test_the_command_of_a_study_names_what_its_judges_read_in_the_environment(
    value: str | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFTUNE_REVIEWS", raising=False)
    if value is not None:
        monkeypatch.setenv("PREFTUNE_REVIEWS", value)
    words = ["data.name=x", "evaluation.gold=preftune.judges.style:sentiment"]
    assert variables(load_recipe("sentiment", words).config) == []
    assert variables(load_recipe("sentiment", [words[0], JUDGES]).config) == [f"PREFTUNE_REVIEWS={word}"]
    assert variables(load_recipe("sentiment", [*words, TAUGHT]).config) == [f"PREFTUNE_REVIEWS={word}"]
