"""A real headless Chromium for the report's tests. Nothing is fetched: without a browser they are skipped."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_watch import Opener, opening

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
FLAGS += ("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker keeps the browser to itself where tests run side by side; no second group by file."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium as the system has it (or $CHROMIUM), driven by playwright."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    with api.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        except api.Error as error:
            pytest.skip(f"{program} does not start here: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Opener]:
    """Opens a file as a reader would, from disk, and watches it: `page, watch = opened(path, width=360)`."""
    with opening(browser) as opener:
        yield opener
