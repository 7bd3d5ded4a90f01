"""The healthy ranges in the figures are those of docs/algorithms/*.md, word for word."""

import re
from pathlib import Path

import pytest
from synthetic import make_run

from damages import shown_by
from preftune.config import ALGORITHM_CONFIGS, PPOConfig
from preftune.report.healthy import healthy
from preftune.report.load import load_run
from preftune.report.plots.curves import curves
from preftune.report.plots.figures import draw
from preftune.rundir import RunDir, write_text

DOCS = Path(__file__).resolve().parents[2] / "docs" / "algorithms"
CASES = [(algorithm, metric) for algorithm, config in ALGORITHM_CONFIGS.items() for metric in config.healthy]


def documented(algorithm: str, metric: str) -> str:
    """What the page of the algorithm says of a metric: "healthy" and "otherwise"."""
    page = (DOCS / f"{algorithm}.md").read_text(encoding="utf-8")
    table = page.split("## Metrics to watch")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith(f"| `{metric}`")]
    assert len(rows) == 1, f"{metric} is not, or not once, in docs/algorithms/{algorithm}.md"
    return rows[0]


@pytest.mark.parametrize(("algorithm", "metric"), CASES)
def test_a_range_is_what_the_page_says(algorithm: str, metric: str) -> None:
    band, row = ALGORITHM_CONFIGS[algorithm].healthy[metric], documented(algorithm, metric)
    assert band.words in row
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?![\d-])", band.words)]
    if band.words.startswith("1 to 1e-5"):
        assert (band.low, band.high) == (1 - 1e-5, 1 + 1e-5)
    elif " to " in band.words:
        assert band.low == numbers[0]
        assert band.high == pytest.approx(numbers[1], abs=0.004)  # 0.69 stands for ln 2
    elif band.words == "positive":
        assert (band.low, band.high) == (0.0, None)
    else:
        assert (band.low, band.high) == (None, numbers[0])


def test_ranges_said_of_hh_are_for_hh_only(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    on_hh = load_run(run)
    assert healthy(on_hh, "reward", "accuracy") is not None
    write_text(run.config, run.config.read_text(encoding="utf-8").replace("Anthropic/hh-rlhf", "world"))
    elsewhere = load_run(run)
    assert healthy(elsewhere, "reward", "accuracy") is None
    assert healthy(elsewhere, "reward", "margin") is not None


def test_a_ceiling_is_called_one_in_the_figure_and_beside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _, words = draw(shown_by(load_run(run), run.metrics("ppo")))["training_ppo.svg"]
    assert "kl (healthy: at most about 30)" in words


def test_the_range_of_the_dpo_loss_is_for_the_sigmoid_only(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert healthy(load_run(run), "dpo", "loss") is not None
    alone = run.config.read_text(encoding="utf-8")
    write_text(run.config, alone + "sft_coef = 0.1\n")
    assert healthy(load_run(run), "dpo", "loss") is None
    write_text(run.config, alone)
    write_text(run.config, run.config.read_text(encoding="utf-8") + 'kind = "ipo"\n')
    assert healthy(load_run(run), "dpo", "loss") is None
    assert healthy(load_run(run), "dpo", "rewards/accuracies") is not None


def test_the_loss_of_grpo_is_not_shown_since_it_means_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = '{"step": 1, "loss": 0.1, "reward": 0.2}\n{"step": 2, "loss": 0.1, "reward": 0.3}\n'
    write_text(run.metrics("grpo"), rows)
    assert list(shown(run, "grpo")) == ["reward"]


def test_what_is_watched_is_drawn_beside_the_score_however_much_is_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    names = [
        "objective/scores",
        "objective/kl",
        *PPOConfig.drawn_first[-8:],
        "rewards/gold/std",
        "rewards/gold/mean",
    ]
    row = ", ".join(f'"{name}": 0.5' for name in names)
    write_text(run.metrics("ppo"), f'{{"step": 1, {row}}}\n{{"step": 2, {row}}}\n')
    assert list(shown(run, "ppo"))[:3] == ["objective/scores", "rewards/gold/mean", "objective/kl"]


def shown(run: RunDir, name: str) -> dict[str, list[tuple[float, float]]]:
    return curves(next(stage for stage in load_run(run).stages if stage.name == name))
