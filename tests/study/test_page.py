"""What STUDY.md says in words, and which rows its tables have."""

import pytest

from preftune.config import load_recipe
from preftune.study.design import Design
from preftune.study.page import _beside, _best_of_n, todays_words
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
    page = _beside({"policies": {"ppo": policy}, "main_set": "test", "seeds": [], **seen})
    assert f"On the test prompts. {SAYS[stages].format('preftune.judges.reviews:liked')} A gain" in page


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
