"""People judge in a real browser: tabs and servers that are killed, and texts that want to be code."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from label_run import begun, collected
from label_server import Served
from page_watch import Opener, Watch
from payloads import PAYLOADS

from patience import PATIENCE, wait_for
from preftune.label.export import take
from preftune.label.page import write_file
from preftune.label.store import Store
from preftune.rundir import RunDir, read_jsonl, write_jsonl
from preftune.untrusted import clean
from sweeps import every

KEYS = {"a": "a", "b": "b", "tie": "t", "bad": "x", "skip": "s"}


class Tab:
    """A rater's page, and what she clicked there by the replies that she saw."""

    def __init__(self, context: Any, link: str) -> None:
        self.context, self.link = context, link
        self.clicked: list[tuple[tuple[str, str], str]] = []
        self.page: Any = None
        self.open()

    def open(self) -> None:
        """Anew, also where the old page's process is dead."""
        if self.page is not None:
            self.page.close()
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.goto(self.link)
        self.until(lambda: bool(self.page.text_content("#count")))

    def seen(self) -> tuple[str, str]:
        return self.page.text_content("#a"), self.page.text_content("#b")

    def done(self) -> int:
        return int(self.page.text_content("#count").split()[0])

    def judge(self, verdict: str, *, key: bool, wait: bool = True) -> None:
        before = self.done()
        self.clicked.append((self.seen(), verdict))
        if key:
            self.page.keyboard.press(KEYS[verdict])
        else:
            self.page.click(f"[data-verdict={verdict}]")
        if wait:
            self.until(lambda: self.done() == before + 1)

    def until(self, what: Callable[[], bool]) -> None:
        Watch().until(self.page, what)


def kill_tabs(browser: Any) -> None:
    """SIGKILL to the process of every page: nothing of them runs any more. A page that is opened before the
    browser has noticed may be given a dead process, and never comes.
    """
    session = browser.new_browser_cdp_session()

    def renderers() -> set[int]:
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        return {process["id"] for process in processes if process["type"] == "renderer"}

    killed = renderers()
    assert killed
    for number in killed:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    wait_for(lambda: not killed & renderers())


@pytest.fixture
def tabs(browser: Any) -> Iterator[Callable[[str], Tab]]:
    """Each rater in a browser of her own, as far as storage goes."""
    contexts = []

    def opened(link: str) -> Tab:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        return Tab(contexts[-1], link)

    yield opened
    for context in contexts:
        context.close()


def kept(run: Path, rater: str) -> list[tuple[tuple[str, str], str]]:
    """What stands in the rater's file, by the replies as A and B."""
    folder = RunDir(run).labels("pairs")
    replies = {row["id"]: row["replies"] for row in read_jsonl(folder / "items.jsonl")}
    rows = read_jsonl(folder / f"{rater}.judgements.jsonl", whole=True)
    return [
        ((replies[row["item"]][row["a"]], replies[row["item"]][1 - row["a"]]), row["verdict"]) for row in rows
    ]


def test_two_raters_lose_and_double_nothing_when_tabs_and_server_are_killed(
    tmp_path: Path, browser: Any, tabs: Callable[[str], Tab]
) -> None:
    served = Served(collected(tmp_path, n=30).path, "--rater", "anna", "--rater", "ben")
    raters = {name: tabs(served.links[name]) for name in ("anna", "ben")}
    words = ["a", "b", "b", "tie", "a", "bad", "skip"]
    try:
        for place in range(32):  # 30 items and two of them again
            for name, tab in raters.items():
                away = (place == 9 and name == "anna") or (place == 20 and name == "ben")
                if away:
                    served.kill()
                tab.judge(words[place % 7], key=place % 2 == 0, wait=not away)
                if place == 9 and name == "anna":  # the server comes back: the page goes on by itself
                    tab.until(lambda tab=tab: "Not saved yet" in tab.page.text_content("#trouble"))
                    served.start()
                    tab.until(lambda tab=tab: tab.done() == 10)
                if place == 20 and name == "ben":  # the tab dies with a click that nobody has heard
                    tab.until(lambda tab=tab: "Not saved yet" in tab.page.text_content("#trouble"))
                    kill_tabs(browser)
                    served.start()
                    for each in raters.values():
                        each.open()
                    assert tab.done() == 21
        for name, tab in raters.items():
            assert tab.page.is_visible("#finished")
            assert kept(tmp_path, name) == tab.clicked
            assert len({event.slot for event in Store(RunDir(tmp_path).labels("pairs")).events[name]}) == 32
        owner = tabs(served.links[""]).page
        assert "Krippendorff" in owner.text_content("#table")
        assert "30 items" in owner.text_content("#raters")
    finally:
        served.kill()


def test_by_keyboard_alone_with_undo_reasons_and_a_reply_of_ones_own(
    tmp_path: Path, tabs: Callable[[str], Tab]
) -> None:
    served = Served(collected(tmp_path, n=4).path, "--tag", "brief")
    try:
        tab = tabs(served.links["me"])
        page, first = tab.page, tab.seen()
        page.focus("summary")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        page.keyboard.type("a bat")  # keys of verdicts, and here only letters
        page.keyboard.press("Tab")
        page.keyboard.type("Best")
        assert tab.done() == 0
        page.focus("[data-verdict=b]")
        page.keyboard.press("Enter")
        tab.until(lambda: tab.done() == 1)
        assert page.evaluate("document.activeElement.id") == "prompt-title"
        assert page.text_content("#said") == "Saved: B is better. 1 of 4 judged."
        page.keyboard.press("u")
        tab.until(lambda: tab.done() == 0)
        assert tab.seen() == first
        assert (page.input_value("#note"), page.input_value("#corrected")) == ("a bat", "Best")
        assert page.is_checked("#tags input")
        page.uncheck("#keys")
        page.keyboard.press("a")
        page.keyboard.press("Control+a")
        assert tab.done() == 0
        tab.judge("a", key=False)
        events = Store(RunDir(tmp_path).labels("pairs")).events["me"]
        assert [event.verdict for event in events if not event.of] == ["b", "a"]
        assert (events[-1].tags, events[-1].note, events[-1].corrected) == (("brief",), "a bat", "Best")
    finally:
        served.kill()


SPOKEN = (
    *(
        'heading "Which reply is better?"',
        'progressbar "Items judged"',
        'button "Undo',
        'heading "Conversation"',
    ),
    *('list "Conversation"', 'article "Reply A"', 'article "Reply B"', 'group "Your judgement"'),
    *(
        'button "A is better',
        'group "Reasons"',
        'checkbox "brief"',
        'textbox "Note"',
        'checkbox "Letter keys"',
    ),
)
NAMES = """() => [...document.querySelectorAll('button, input, textarea, progress')]
  .filter(e => e.checkVisibility())
  .map(e => [e.textContent.trim() || e.labels?.[0]?.textContent || e.getAttribute('aria-label') || '',
    e.tagName, (e.closest('label') || e).getBoundingClientRect().height])"""


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_every_control_has_a_name_and_a_size(
    width: int, tmp_path: Path, opened: Opener
) -> None:
    store = begun(collected(tmp_path, n=4), tags=["brief", "polite"])
    write_file(store, "me", tmp_path / "page.html")
    page, watch = opened(tmp_path / "page.html", width=width)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    a, b = (page.locator(f"article:has(#{side})").bounding_box() for side in "ab")
    assert (a["y"] == b["y"]) is (width == 1280)  # side by side where there is room
    spoken = page.locator("body").aria_snapshot()
    assert [part for part in SPOKEN if part not in spoken] == []
    found = page.evaluate(NAMES)
    assert len(found) >= 12
    for name, tag, height in found:
        assert name, tag
        assert tag == "PROGRESS" or height >= 40, name
    bar = page.locator(".bar").bounding_box()
    assert bar["y"] + bar["height"] <= 801  # in sight without scrolling
    assert watch.everything == []


def test_a_file_without_a_server_keeps_through_a_closed_tab_and_comes_back(
    tmp_path: Path, browser: Any
) -> None:
    store = begun(collected(tmp_path, n=10), raters=["anna", "ben"])
    write_file(store, "ben", tmp_path / "page.html")
    context = browser.new_context()
    watch = Watch()
    tab = Tab(context, (tmp_path / "page.html").as_uri())
    for place, word in enumerate(["a", "tie", "b", "b"]):
        tab.judge(word, key=place == 1)
    kill_tabs(browser)
    tab.open()
    watch.on(tab.page, (tmp_path / "page.html").as_uri())
    assert tab.done() == 4
    tab.page.keyboard.press("u")
    tab.until(lambda: tab.done() == 3)
    tab.clicked.pop()
    for _ in range(7):
        tab.judge("a", key=True)
    with tab.page.expect_download() as saved:
        tab.page.click("#save")
    saved.value.save_as(tmp_path / "back.json")
    assert saved.value.suggested_filename == "judgements-ben.json"
    assert take(store, tmp_path / "back.json") == (10, 0)
    assert kept(tmp_path, "ben") == tab.clicked
    assert [text for text in (*watch.console, *watch.errors, *watch.dialogs) if text] == []
    assert all(request.startswith("blob:") for request in watch.requests)
    context.close()


def hostile(folder: Path, texts: Sequence[str]) -> Path:
    """A run whose prompts and replies are these texts."""
    rows = [
        {"row": i, "prompt": [{"role": "user", "content": text}, {"role": text, "content": "?"}]}
        | {"replies": [f"{i} {text}", f"{text} {i}"], "scores": [0.0, 1.0]}
        for i, text in enumerate(texts)
    ]
    write_jsonl(folder / "collected" / "pairs" / "replies.jsonl", rows)
    return folder


@pytest.mark.parametrize("kind", ["served", "file"])
def test_no_text_becomes_code(kind: str, tmp_path: Path, browser: Any) -> None:
    """A hundred payloads as prompt, role, reply and tag, shown one after the other; by the file, which shows
    them by the same code, every fifth.
    """
    texts = PAYLOADS if kind == "served" else every(5, PAYLOADS)
    folder = hostile(tmp_path, texts)
    context, watch = browser.new_context(), Watch()
    page = context.new_page()
    tag = "<img src=x onerror=hit()>"
    with ExitStack() as stack:
        if kind == "file":
            store = begun(RunDir(folder), name=kind, repeats=0.0, tags=[tag])
            write_file(store, "me", folder / "page.html")
            link = (folder / "page.html").as_uri()
        else:
            served = Served(folder, "--set", kind, "--repeats", "0", "--tag", tag)
            stack.callback(served.kill)
            store, link = Store(RunDir(folder).labels(kind)), served.links["me"]
        own = ("/label.js", "/label.css", "/api/state", "/api/judge")
        watch.on(page, link.split("#")[0])
        page.goto(link)
        shown = set()
        for place in range(len(texts)):
            watch.until(page, lambda place=place: page.text_content("#count").startswith(f"{place} of"))
            shown |= {page.text_content("#a"), page.text_content("#b")}
            page.keyboard.press("a")
        page.wait_for_selector("#finished", state="visible")
        expected = {text for slot in store.slots("me") for text in _sides(store, slot.key)}
        assert shown == expected
        assert page.evaluate("window.hit") is None
        assert (
            page.evaluate("document.querySelectorAll('main img, main script, main a, main svg').length") == 0
        )
        assert [asked for asked in watch.requests if not asked.endswith(own)] == []
        assert (watch.console, watch.errors, watch.dialogs) == ([], [], [])
    context.close()


def _sides(store: Store, key: str) -> list[str]:
    return [clean(reply, None) for reply in store.items[key.partition("-")[0]].replies]


def test_the_policy_of_the_served_page_stops_what_escaping_would_let_through(
    tmp_path: Path, tabs: Callable[[str], Tab]
) -> None:
    served = Served(collected(tmp_path, n=2).path)
    try:
        page, watch = tabs(served.links["me"]).page, Watch()
        watch.on(page, "")
        for code in (
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hit()>')",
            "document.createElement('img').setAttribute('onerror', 'window.hit = 1')",
            "document.createElement('script').textContent = 'window.hit = 1'",
        ):
            with pytest.raises(Exception, match="requires 'Trusted"):
                page.evaluate(code)
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate("fetch('http://attacker.example/')")
        assert any("Content Security Policy" in text for text in watch.console)
        assert json.loads(page.evaluate("JSON.stringify(localStorage)")) == {}
    finally:
        served.kill()
