"""ANALYSIS.md and report.html: whole, partial and hostile runs."""

import base64
import hashlib
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from synthetic import make_run

import prose
from damages import shown_by
from made_once import figures
from preftune.cli import main
from preftune.errors import DataError, InputMissing
from preftune.records.base import Estimate
from preftune.report import build, cautions, load_run
from preftune.report.plots.figures import draw
from preftune.report.sentences import verdict_sentences
from preftune.report.tables import column
from preftune.rundir import RunDir, read_json, write_json, write_text

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> ````\n```\n# heading\n[link](javascript:alert(3)) "
    "\x1b[31mred\x1b[0m \x07\x9b ‮evil⁦ \ud800 | a | $x$ </pre></style>{{ 7*7 }}"
)
HEADINGS = (
    "Comparison",
    "What is significant",
    "Set-up",
    "Data",
    "Reward model",
    "Training",
    "Samples",
    "Limits",
)


def texts(run: RunDir) -> tuple[str, str]:
    """Build, and read back ANALYSIS.md with the files that it links, and report.html."""
    build(run)
    return read(run)


def read(run: RunDir) -> tuple[str, str]:
    apart = sorted(run.analysis_details.glob("*.md"))
    analysis = "".join(path.read_text(encoding="utf-8") for path in (run.analysis_text, *apart))
    return analysis, run.report_page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run with its report, for tests that only read."""
    run = make_run(tmp_path_factory.mktemp("whole"), gold={"policy_ppo": 0.1})
    with figures(drawn=True):
        build(run)
    return run


class Tags(HTMLParser):
    """Collects tags, attributes and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_build_writes_what_it_returns_and_the_same_bytes_again(whole: RunDir) -> None:
    apart = whole.analysis_details.glob("*.md")
    kinds = (whole.analysis_text, whole.report_page, *apart, *whole.figures.iterdir())
    first = {path: path.read_bytes() for path in kinds}
    with figures(drawn=True):
        assert {path: path.read_bytes() for path in build(str(whole.path))} == first
    drawn = {path.name for path in whole.figures.iterdir()}
    assert {"reward_kl.svg", "reward_kl_gold.svg", "reward_model_margins.svg"} < drawn
    assert {f"training_{stage}.svg" for stage in ("sft", "rm", "ppo", "grpo", "dpo")} < drawn


def test_what_a_report_has_no_more_goes_and_each_stage_has_its_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("ppo_2", "ppo-2"):
        shutil.copytree(run.stage_dir("ppo"), run.stage_dir(name))
        write_json(run.stage_json(name), read_json(run.stage_json(name)) | {"stage": name})
    with figures(drawn=True):
        build(run)
    first = {path.name for path in run.figures.iterdir()}
    assert {"training_ppo_2.svg", "training_ppo-2.svg"} < first
    assert (run.analysis_details / "mistakes.md").is_file()
    shutil.rmtree(run.stage_dir("ppo_2"))
    run.mistakes.unlink()
    run.reward_evaluation.unlink()
    with figures(drawn=True):
        build(run)
    assert {path.name for path in run.figures.iterdir()} < first - {"training_ppo_2.svg"}
    assert not (run.analysis_details / "mistakes.md").exists()


def test_both_texts_say_the_same_and_open_with_the_verdict(whole: RunDir) -> None:
    analysis, page = read(whole)
    paragraphs = analysis.split("\n\n")
    assert paragraphs[0] == "# Analysis of `trial`"
    assert paragraphs[1] == "PPO beats SFT by gold."  # the summary, then the table
    assert paragraphs[3].startswith("| Policy |")
    assert len(whole.analysis_text.read_text(encoding="utf-8").splitlines()) < 300
    words = Tags(page).words
    assert verdict_sentences(load_run(whole))[0] in words
    for heading in HEADINGS:
        assert f"# {heading}" in analysis
        assert heading in words
    for fact in (
        "990 kept",
        "empty_response",
        "became_equal",
        "rejected is longer",
        "68.0 % [65.0, 71.0]",
        "Peak memory",
    ):
        assert fact in analysis
        assert fact in words


def test_samples_put_the_same_prompt_to_every_policy(whole: RunDir) -> None:
    analysis, _ = read(whole)
    first = analysis.split("### Prompt 1")[1].split("### Prompt 2")[0]
    for policy in ("base", "policy_sft", "policy_ppo", "policy_grpo", "policy_dpo", "best_of_4"):
        assert f"I can help with that. ({policy})" in first
    assert first.count("Question 0") == 1


def test_page_is_one_small_file_without_addresses(whole: RunDir) -> None:
    _, page = read(whole)
    assert len(page.encode()) < 3_000_000
    tags = Tags(page)
    assert not {"link", "iframe", "object", "form", "base"} & set(tags.tags)
    sources = [value for key, value in tags.attributes if key in ("src", "href")]
    assert all(value.startswith(("data:image/svg+xml;base64,", "#")) for value in sources)
    assert all(value for key, value in tags.attributes if key == "alt")


def test_the_policy_admits_one_script_and_one_style_by_their_hash(whole: RunDir) -> None:
    _, page = read(whole)
    tags = Tags(page)
    assert (tags.tags.count("script"), tags.tags.count("style")) == (1, 1)
    policy = next(value for key, value in tags.attributes if "default-src" in value)
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        inside = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert parts.pop(rule) == f"'sha256-{digest}'"
    assert parts == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [key for key, _ in tags.attributes if key == "style" or key.startswith("on")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return texts(make_run(tmp_path_factory.mktemp("hostile"), name="<b>x</b>`y` [a](b)", text=HOSTILE))


def test_hostile_text_is_only_text_in_the_page(hostile: tuple[str, str]) -> None:
    _, page = hostile
    harmless = Tags(page)
    assert harmless.tags.count("script") == 1  # our own
    assert "b" not in harmless.tags
    assert not [key for key, _ in harmless.attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in harmless.words  # visible as it was written
    assert "{{ 7*7 }}" in harmless.words


def test_hostile_text_is_only_text_in_markdown(hostile: tuple[str, str]) -> None:
    analysis, _ = hostile
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(analysis)
    flat = [inner for token in tokens for inner in [token, *(token.children or [])]]
    assert not [token for token in flat if token.type in ("html_block", "html_inline")]
    links = {str(token.attrs["href"]) for token in flat if token.type == "link_open"}
    own = {f"analysis/{key}.md" for key in ("samples", "mistakes", "data", "setup", "config")}
    assert links == {*own, "../ANALYSIS.md"}
    assert {token.tag for token in tokens if token.type == "heading_open"} <= {"h1", "h2", "h3"}
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "heading" not in headings
    fences = [token.content for token in tokens if token.type == "fence"]
    assert any("````\n```\n# heading" in content for content in fences)


@pytest.mark.parametrize("which", [0, 1])
def test_no_control_or_bidi_character_survives(hostile: tuple[str, str], which: int) -> None:
    found = re.findall(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", hostile[which]
    )
    assert found == []
    assert "⟨U+001B⟩[31mred" in hostile[which]
    assert "⟨U+202E⟩evil" in hostile[which]


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    analysis, page = texts(make_run(tmp_path, text="word " * 4000))
    assert "more characters)" in analysis
    assert len(page.encode()) < 3_000_000


def test_figures_are_images_with_dark_colours_and_no_date(whole: RunDir) -> None:
    _, page = read(whole)
    svg = (whole.figures / "reward_kl.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in svg
    assert "<dc:date>" not in svg
    assert "nats per response" in svg
    assert "best of 4 (SFT)" in svg
    assert base64.b64encode(svg.encode()).decode() in page


def test_a_dollar_in_a_label_is_not_mathematics(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run.evaluation("policy_ppo")
    write_text(path, path.read_text(encoding="utf-8").replace('"PPO"', '"$\\\\frac{$ & <b>"'))
    svg, _ = draw(shown_by(load_run(run), path))["reward_kl.svg"]
    assert "$\\frac{$ &amp; &lt;b&gt;" in svg


def test_a_run_of_which_nothing_is_there_yet_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    analysis, page = texts(RunDir(tmp_path))
    assert "no policy has been evaluated" in analysis
    for words in (
        "config.toml",
        "run.json",
        "data.json",
        "the evaluation of the reward model",
        "There are no samples",
    ):
        assert words in analysis
        assert words in Tags(page).words


def test_a_run_with_one_stage_done_and_one_running(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for folder in ("evaluation", "samples", "analysis"):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
    for stage in ("ppo", "grpo", "dpo"):
        for path in run.stage_dir(stage).iterdir():
            path.unlink()
        run.stage_dir(stage).rmdir()
    text = run.stage_json("rm").read_text(encoding="utf-8").replace("finished", "running")
    write_text(run.stage_json("rm"), text)
    with figures(drawn=True):
        analysis, _ = texts(run)
    for words in ("stage rm: running", "stage ppo: not started", "the evaluation of policy\\_sft"):
        assert words.replace("\\_", "_") in analysis
    assert "figures/training_sft.svg" in analysis
    assert "figures/reward_kl.svg" not in analysis


def test_metrics_of_odd_kinds_are_drawn_or_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    rows = '{"step": 1, "loss": "NaN", "note": null}\n{"step": 2, "time": 2, "loss": 0.5}\n'
    write_text(run.metrics("sft"), rows + '{"step": 3, "lo')
    with pytest.raises(DataError, match=r"metrics\.jsonl:3"):  # the stage is finished: none may be cut off
        build(run)
    write_text(run.metrics("sft"), rows)
    build(run)
    assert "training_sft.svg" in draw(shown_by(load_run(run), run.metrics("sft")))


def test_a_directory_without_a_run_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["report", str(tmp_path)]) == InputMissing.code == 66
    assert f"{tmp_path} is not a run directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="nothing-here"):
        build(tmp_path / "nothing-here")
    run = make_run(tmp_path)
    write_text(run.evaluation("policy_ppo"), '{"policy": "policy_ppo", "score": {"mean": "many"}}')
    with pytest.raises(DataError, match=r"policy_ppo\.json"):
        load_run(run)


def test_a_heading_is_not_broken_before_its_percent_sign(whole: RunDir) -> None:
    analysis, page = read(whole)
    assert "| Score [95 %] |" in analysis
    assert ">Score [95\u00a0%]</th>" in page


def test_a_column_has_as_many_decimals_in_every_row(tiny_run: RunDir) -> None:
    wide, narrow = Estimate(value=-3.17, low=-8.6, high=0.16), Estimate(value=1.164, low=0.48, high=2.03)
    assert column([wide, None, narrow]) == ["-3.17 [-8.60, 0.16]", "–", "1.16 [0.48, 2.03]"]
    small, large = Estimate(value=0.0133, low=0.0083, high=0.0202), Estimate(value=0.37, low=0.23, high=0.56)
    assert column([small, large], sign=True) == ["+0.013 [0.008, 0.020]", "+0.370 [0.230, 0.560]"]
    lines = tiny_run.analysis_text.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| Policy | Score [95 %]"))
    rows = [line.split("|")[1:-1] for line in lines[start + 2 : lines.index("", start)]]
    for cells in zip(*rows, strict=True):
        decimals = {len(found) for cell in cells for found in re.findall(r"\d\.(\d+)", cell)}
        assert len(decimals) <= 1, cells


def test_the_analysis_of_a_whole_run_is_short_and_links_the_rest(tiny_run: RunDir) -> None:
    analysis = tiny_run.analysis_text.read_text()
    assert len(analysis.splitlines()) < 300
    for file in ("samples", "mistakes", "data", "setup", "config"):
        assert f"(analysis/{file}.md)" in analysis
        assert (tiny_run.analysis_details / f"{file}.md").is_file()


def test_a_run_too_small_to_learn_says_so_among_the_first_three_cautions(tiny_run: RunDir) -> None:
    assert any(
        caution.startswith("Too small to show learning") for caution in cautions(load_run(tiny_run))[:3]
    )


def test_the_data_card_says_what_was_kept_how_long_and_what_overlaps(whole: RunDir) -> None:
    analysis, _ = read(whole)
    card = analysis.split("# Data\n")[1].split("\n# ")[0]
    assert "1,000 rows read, 990 kept, 10 rejected (1.0 %)." in card
    assert "two splits: `train/test` 2." in card
    assert "| `train` | 890 | 888 | 31 / 140 / 1,207 | 9 / 60 / 300 | 8 / 61 / 299 |" in card
    assert re.search(r"\| `empty_response` \| .* \| 7 \|", card)
    assert "| `identical` | – | 3 |" in card
    prose.compare("report/report: the data card", card)


def test_settings_carry_where_they_come_from(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "no record of where" in texts(run)[0]
    write_json(run.origins, {"recipe": "hh-gpt2", "origins": {"seed": "command line", "name": "recipe"}})
    analysis, page = texts(run)
    assert "| `seed` | `3` | `command line` |" in analysis
    assert '| `model.base` | `"gpt2"` | `–` |' in analysis
    assert "1 by the command line" in page
    origins = dict.fromkeys(("name", "seed", "precision", "model.base"), "default")
    write_json(run.origins, {"recipe": "hh-gpt2", "origins": origins})
    assert "| `seed` | `3` | `default` |" in texts(run)[0].split("**All settings**")[1]
