"""The page as people use it: from disk, by keyboard, without script, narrow, dark, printed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_watch import Opener, Watch
from synthetic import make_run
from synthetic_newer import add_newer_parts

from made_once import figures
from preftune.report import build
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl

UNFOLD = "document.querySelectorAll('details.part').forEach(part => { part.open = true; })"
pytestmark = pytest.mark.usefixtures("with_figures")

SIZES = [(360, "light"), (1280, "dark")]
SIZES += [pytest.param(*size, marks=pytest.mark.slow) for size in ((360, "dark"), (1280, "light"))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A whole run; PPO's scores are known so that filters can be checked by hand: prompt i scores i."""
    run = add_newer_parts(make_run(tmp_path_factory.mktemp("page")))
    path = run.samples_file("policy_ppo")
    rows = [row | {"score": float(i)} for i, row in enumerate(read_jsonl(path))]
    rows[7] |= {"response": "A Zebra crossing, then."}
    write_jsonl(path, rows)
    for policy in ("base", "policy_sft", "policy_grpo", "policy_dpo", "best_of_4"):
        other = run.samples_file(policy, "gpt2")
        write_jsonl(other, [row | {"score": -1.0} for row in read_jsonl(other)])
    build(run)
    return run


@pytest.fixture
def page(report: RunDir, opened: Opener) -> Iterator[Any]:
    page, watch = opened(report.report_page)
    page.evaluate(UNFOLD)
    yield page
    assert watch.everything == []


def shown(page: Any, box: str) -> list[str]:
    """Titles of the cards that are to be seen."""
    return page.locator(f"#{box}-explorer .card:visible summary strong").all_text_contents()


def tool(page: Any, box: str, label: str) -> Any:
    return page.locator(f"#{box}-explorer .tools").get_by_label(label, exact=True)


def press(page: Any, box: str, button: str) -> None:
    page.locator(f"#{box}-explorer .tools").get_by_role("button", name=button).click()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_it_opens_from_disk_and_fits(
    report: RunDir, opened: Opener, tmp_path: Path, width: int, scheme: str
) -> None:
    page, watch = opened(report.report_page, width=width, scheme=scheme)
    page.screenshot(path=tmp_path / f"report-{width}-{scheme}.png")
    assert (tmp_path / f"report-{width}-{scheme}.png").stat().st_size > 10_000
    assert watch.everything == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 30)"
    assert dark is (scheme == "dark")


def test_the_first_screen_has_verdict_table_and_a_prompt(page: Any) -> None:
    for what in (".verdict", "#comparison table", "#comparison .side .quote"):
        box = page.locator(what).first.bounding_box()
        assert box["y"] + box["height"] <= 800


def test_the_page_is_eight_screens_and_a_link_unfolds_its_part(report: RunDir, opened: Opener) -> None:
    page, _ = opened(report.report_page)
    assert page.evaluate("document.documentElement.scrollHeight") <= 8 * 800
    assert not page.locator("#samples-explorer").is_visible()
    page.locator("nav a[href='#samples']").click()
    assert page.locator("#samples-explorer").is_visible()


def test_long_lists_are_shown_a_page_at_a_time(tmp_path: Path, opened: Opener) -> None:
    run = make_run(tmp_path)
    write_jsonl(run.mistakes, [row | {"idx": i} for i, row in enumerate(read_jsonl(run.mistakes) * 3)])
    with figures(drawn=False):
        build(run)
    page, _ = opened(run.report_page)
    page.evaluate(UNFOLD)
    total = len(read_jsonl(run.mistakes))
    assert total > 20
    assert len(shown(page, "mistakes")) == 20
    while len(shown(page, "mistakes")) < total:
        press(page, "mistakes", "Show more")
    assert not page.locator("#mistakes-explorer [data-is=more]").is_visible()


def test_a_table_of_many_policies_has_the_whole_width(tmp_path: Path, opened: Opener) -> None:
    """A sweep's labels are long: beside the figure the last column, the gold score, was out of view."""
    run = make_run(tmp_path, gold={"policy_ppo": 0.1})
    record = read_json(run.evaluation("policy_ppo"))
    for place in range(3):
        name = f"policy_ppo-kl_coef-0_0{place}"
        label = {"policy": name, "label": f"PPO (ppo-kl_coef-0_0{place})"}
        write_json(run.evaluation(name), record | label)
    build(run)
    page, _ = opened(run.report_page)
    table = page.locator("#comparison .wide").first
    assert "PPO (ppo-kl_coef-0_02)" in table.text_content()
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert table.bounding_box()["width"] > 1200  # of 1280


RATIO = """element => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const shade = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && node.parentElement ? shade(node.parentElement) : colour;
  };
  const [a, b] = [light(getComputedStyle(element).color), light(shade(element))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(report: RunDir, opened: Opener, scheme: str) -> None:
    """WCAG 2.1, criterion 1.4.3: at least 4.5 to 1; shades of the explorer included."""
    page, _ = opened(report.report_page, scheme=scheme)
    for what in ("body", "a", ".brand", "td small", "pre", "pre i", "code", ".tools output", "footer"):
        ratios = page.locator(what).evaluate_all(f"elements => elements.slice(0, 40).map({RATIO})")
        assert min(ratios) >= 4.5, what


def test_search_finds_words_in_any_text(page: Any) -> None:
    assert len(shown(page, "samples")) == 20
    tool(page, "samples", "Search").fill("zebra")
    assert shown(page, "samples") == ["Prompt 8"]
    assert page.locator("#samples-explorer output").text_content() == "1 of 1 shown, 20 in all"
    tool(page, "samples", "Search").fill("question 1")
    assert shown(page, "samples") == [f"Prompt {n}" for n in (2, *range(11, 21))]  # question 1 and 10 to 19
    tool(page, "samples", "Search").fill("no such words")
    assert shown(page, "samples") == []
    press(page, "samples", "Clear")
    assert len(shown(page, "samples")) == 20


def test_samples_can_be_filtered_by_the_score_of_one_policy(page: Any) -> None:
    tool(page, "samples", "Score from").fill("15.5")
    assert shown(page, "samples") == [f"Prompt {n}" for n in (17, 18, 19, 20)]
    tool(page, "samples", "Score to").fill("17")
    assert shown(page, "samples") == ["Prompt 17", "Prompt 18"]
    tool(page, "samples", "Score of").select_option(label="SFT")
    assert shown(page, "samples") == []
    tool(page, "samples", "Score from").fill("-2")
    assert len(shown(page, "samples")) == 20
    tool(page, "samples", "Score of").select_option(label="PPO")
    tool(page, "samples", "Search").fill("zebra")
    assert shown(page, "samples") == ["Prompt 8"]


def test_mistakes_can_be_filtered_by_tag_confidence_and_words(page: Any) -> None:
    assert shown(page, "mistakes")[0] == "Validation row 40"  # the surest
    tool(page, "mistakes", "Tag").select_option(label="rejected is longer (6)")
    assert shown(page, "mistakes") == [f"Validation row {n}" for n in range(41, 52, 2)]
    tool(page, "mistakes", "Confidence from").fill("0.9")
    assert shown(page, "mistakes") == ["Validation row 41", "Validation row 43"]  # margins -2.75 and -2.25
    tool(page, "mistakes", "Search").fill("validation row 43")
    assert shown(page, "mistakes") == ["Validation row 43"]


def test_one_explorer_leaves_the_other_alone(page: Any) -> None:
    tool(page, "samples", "Search").fill("no such words")
    assert len(shown(page, "mistakes")) == 12


def test_cards_open_and_close_together(page: Any) -> None:
    cards = page.locator("#samples-explorer .card[open]")
    assert cards.count() == 3
    press(page, "samples", "Open all")
    assert cards.count() == 20
    press(page, "samples", "Close all")
    assert cards.count() == 0


FOCUSED = "document.activeElement.outerHTML.slice(0, 200)"


def test_everything_can_be_reached_and_used_by_keyboard(page: Any) -> None:
    reached = []
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert width == "3px" or reached[-1].startswith("<body"), f"no visible focus on {reached[-1]}"
        if reached[-1].startswith("<body"):
            break
    assert reached[0].startswith('<a href="#comparison"')
    fields = [f'data-is="{name}"' for name in ("find", "tag", "by", "from", "to", "open", "close", "clear")]
    for part in ('<div class="wide" tabindex', '<figure class="broad"', "<summary>", *fields):
        assert any(part in html for html in reached), f"{part} is not in the order of Tab"


def test_a_card_opens_with_the_enter_key(page: Any) -> None:
    card = page.locator("#samples-explorer .card").nth(5)
    card.locator("summary").focus()
    page.keyboard.press("Enter")
    assert card.get_attribute("open") is not None
    page.keyboard.press("Space")
    assert card.get_attribute("open") is None


def test_without_script_everything_is_there(report: RunDir, opened: Opener) -> None:
    page, watch = opened(report.report_page, script=False)
    assert page.locator(".card").count() == page.locator(".card[open]").count() == 32
    for summary in page.locator("details.part > summary").all():  # these fold without a script
        summary.click()
    assert page.locator(".card pre:visible").count() == 20 * 7 + 12 * 3
    assert page.locator(".tools:visible").count() == 0  # tools that would do nothing
    assert watch.everything == []


def test_paper_shows_no_tools(page: Any) -> None:
    page.emulate_media(media="print")
    for what in ("nav", ".tools"):
        assert page.locator(f"{what}:visible").count() == 0
    assert page.locator("#comparison table").first.is_visible()
    note = page.locator(".fold").first
    assert note.get_attribute("open") is None
    assert note.bounding_box()["height"] > 60  # paper cannot be clicked: notes and tables are printed open
    assert page.pdf().startswith(b"%PDF")


def test_a_broken_page_is_noticed(tmp_path: Path, opened: Opener) -> None:
    """The watch itself: it sees a message, an error, a dialog and a request."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<script>console.log('x');setTimeout(() => {throw Error('y')});alert('z')</script><img src=b.png>",
        encoding="utf-8",
    )
    page, watch = opened(path)
    assert isinstance(watch, Watch)
    watch.until(page, lambda: watch.errors and watch.requests and watch.console and watch.dialogs)
    assert watch.dialogs == ["z"]
    assert "log: x" in watch.console
    assert watch.errors
    assert any(url.endswith("b.png") for url in watch.requests)
