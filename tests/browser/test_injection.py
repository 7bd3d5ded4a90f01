"""Nothing that a data set, a model or a person wrote becomes markup: a hundred payloads in every place."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_watch import Opener, Watch, opening
from payloads import PAYLOADS
from synthetic import make_run
from synthetic_newer import add_newer_parts

from preftune.records.run import DataRecord
from preftune.report import build, load_run
from preftune.report.contents import sections
from preftune.report.text import clean, name
from preftune.report.writers.page import page_text
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text
from sweeps import every

pytestmark = pytest.mark.usefixtures("with_figures")

VISIBLE = "document.body.textContent"
# fmt: off
OURS = {
    "html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "footer", "script",
    "h1", "h2", "h4", "p", "a", "div", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "small",
    "code", "strong", "span", "pre", "i", "figure", "img", "details", "summary", "label", "input", "select",
    "option", "button", "output",
}
# fmt: on


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a run in which every text of others is a payload, each payload in every kind of place."""
    run = add_newer_parts(make_run(tmp_path_factory.mktemp("hostile")))
    for policy in ("base", "policy_sft", "policy_ppo", "policy_grpo", "policy_dpo", "best_of_4"):
        path = run.samples_file(policy, "gpt2")
        row = read_jsonl(path)[0]
        write_jsonl(
            path, [row | {"prompt": f"{i}: {text}", "response": text} for i, text in enumerate(PAYLOADS)]
        )
    mistake = read_jsonl(run.mistakes)[0]
    write_jsonl(run.mistakes, [mistake | _mistake(i, text) for i, text in enumerate(PAYLOADS)])
    _records(run)
    build(run)
    return run.report_page


def _mistake(place: int, text: str) -> dict[str, Any]:
    tokens = [[text[:9], 0.0], [text[9:], 1.0 if place % 2 else -1.0]]
    texts = dict.fromkeys(("prompt", "chosen", "rejected", "source"), text)
    return {"idx": place, "tags": [text], "tokens_chosen": tokens, "tokens_rejected": tokens} | texts


def _records(run: RunDir) -> None:
    """Payloads as names in the records: sources, labels, tags, metrics, versions, reasons, settings."""
    record = read_json(run.reward_evaluation)
    record["by_source"] = {text: record["accuracy"] for text in PAYLOADS}
    record["mistake_tags"] = {text: record["mistake_tags"]["very short"] for text in PAYLOADS}
    record["sanity"] = [record["sanity"][1] | {"name": text, "label": text} for text in PAYLOADS[:20]]
    record["expected_band"] = {"low": None, "high": None, "text": PAYLOADS[30], "source": PAYLOADS[31]}
    write_json(run.reward_evaluation, record)
    lost = {"mean": -0.5, "interval": [-0.8, -0.2], "n": 30}  # among the cautions, where the policy gained
    by_prompt = {"source": {text: {"n": 30, "score": lost} for text in PAYLOADS[:12]}}
    for policy, text in (("policy_ppo", PAYLOADS[70]), ("policy_dpo", PAYLOADS[40])):
        record = read_json(run.evaluation(policy))
        write_json(run.evaluation(policy), record | {"label": text, "by_prompt": by_prompt})
    write_jsonl(run.metrics("sft"), [{"step": step, PAYLOADS[20]: 0.5 * step} for step in range(1, 4)])
    write_json(
        run.run, {"command": list(PAYLOADS), "versions": {PAYLOADS[50]: PAYLOADS[51]}, "commit": PAYLOADS[52]}
    )
    data = read_json(run.data)
    data |= {"name": PAYLOADS[60], "rejected": dict.fromkeys(PAYLOADS, 3), "duplicates": PAYLOADS[61]}
    data["files"] = [data["files"][0] | {"path": text} for text in PAYLOADS[:20]]
    write_json(run.data, data)
    write_json(run.origins, {"recipe": PAYLOADS[62], "origins": {"seed": PAYLOADS[63]}})
    write_text(
        run.config,
        run.config.read_text(encoding="utf-8").replace('"gpt2"', "'''<img src=x onerror=hit()>'''"),
    )


UNFOLDED = """() => {
  document.querySelectorAll("details.part").forEach(part => { part.open = true; });
  document.querySelectorAll("[data-is=more]").forEach(more => { while (!more.hidden) more.click(); });
}"""


@pytest.fixture(scope="module")
def seen(hostile: Path, browser: Any) -> Iterator[tuple[Any, Watch]]:
    """The page, opened once for those who look at it, with every part of it unfolded."""
    with opening(browser) as opened:
        page, watch = opened(hostile)
        page.evaluate(UNFOLDED)
        yield page, watch


@pytest.fixture
def page(seen: tuple[Any, Watch]) -> Iterator[Any]:
    page, watch = seen
    yield page
    assert watch.everything == []
    assert page.evaluate("window.hit") is None


def test_there_are_a_hundred() -> None:
    assert len(set(PAYLOADS)) == 100


def test_every_payload_can_be_read_as_it_was_written(page: Any) -> None:
    shown = page.evaluate(VISIBLE)
    missing = [text for text in PAYLOADS if shown.count(clean(text.strip("\n"), None)) < 8]
    assert missing == []  # six responses, chosen and rejected at the least


def test_the_page_has_no_element_that_is_not_ours(page: Any) -> None:
    found = set(page.evaluate("[...document.querySelectorAll('*')].map(e => e.tagName.toLowerCase())"))
    assert found <= OURS
    names = page.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert [attribute for attribute in names if attribute == "style" or attribute.startswith("on")] == []
    sources = page.evaluate(
        "[...document.querySelectorAll('[src],[href]')].map(e => e.src || e.getAttribute('href'))"
    )
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in sources)
    assert page.evaluate("document.scripts.length") == 1


def test_using_the_page_runs_nothing_either(page: Any) -> None:
    for box in ("samples", "mistakes"):
        tools = page.locator(f"#{box}-explorer .tools")
        tools.get_by_role("button", name="Open all").click()
        for text in PAYLOADS[::7]:
            tools.get_by_role("searchbox").fill(text)
        tools.get_by_role("button", name="Clear").click()
        page.evaluate(UNFOLDED)
    tags = page.locator("#mistakes-explorer select")
    for place in range(0, 100, 9):
        tags.select_option(str(place))
        assert page.locator("#mistakes-explorer .card:visible").count() == 1
    page.mouse.move(300, 300)
    page.emulate_media(media="print")
    page.emulate_media(media="screen")


def test_every_figure_is_drawn_and_holds_its_payload_as_text(page: Any, hostile: Path) -> None:
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    svg = (hostile.parent / "figures" / "reward_kl.svg").read_text(encoding="utf-8")
    assert "<script" not in svg
    assert "&lt;" in svg


def test_no_payload_gets_out_of_the_name_of_a_run(tmp_path: Path, opened: Opener) -> None:
    view = replace(load_run(make_run(tmp_path)), samples={}, mistakes=())
    page, watch = opened(_written(tmp_path / "first.html", page_text(view, (), {})))
    for place, text in enumerate(every(5, PAYLOADS)):
        config = {"name": text, "model": {"base": text}, "data": {"name": text, "form": text}}
        named = replace(view, name=text, config=config, data=DataRecord.model_validate({"name": text}))
        path = _written(tmp_path / f"{place}.html", page_text(named, sections(named, {}), {}))
        watch.requests.clear()
        page.goto(path.as_uri())
        assert page.locator("h1").text_content() == name(text)
        assert page.title() == " ".join(f"{name(text)} · preftune".split())
        assert [asked for asked in watch.everything if asked != path.as_uri()] == []
        assert page.evaluate("window.hit") is None


def _written(path: Path, text: str) -> Path:
    write_text(path, text)
    return path


SCRIPT = """() => {
  const script = document.createElement("script");
  script.textContent = "window.hit = 1";
  document.body.append(script);
}"""


def test_the_policy_stops_what_escaping_would_let_through(hostile: Path, opened: Opener) -> None:
    """The second line of defence, tried alone: markup put into the page still runs and asks nothing."""
    page, watch = opened(hostile)
    sent: list[str] = []  # what gets past the policy: a request event alone also comes for what it blocks
    page.route(lambda url: "attacker" in url, lambda route: (sent.append(route.request.url), route.abort()))
    # A refresh is a navigation, and no policy stops those: against it there is the escaping alone.
    markup = "\n".join(text for text in PAYLOADS if "refresh" not in text)
    page.evaluate("text => document.body.insertAdjacentHTML('beforeend', text)", markup)
    page.evaluate(SCRIPT)
    watch.until(page, lambda: any("Content Security Policy" in text for text in watch.console))
    page.wait_for_timeout(300)  # for what must not come: a busy machine may hide it, and never makes it up
    assert page.evaluate("window.hit") is None
    assert watch.dialogs == []
    assert all(
        "Content Security Policy" in text or "Refused" in text for text in watch.console if "error" in text
    )
    assert [text for text in watch.console if "Content Security Policy" in text]
    assert sent == []
