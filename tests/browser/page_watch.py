"""What a page did that a report must not: console messages, script errors, dialogs, requests."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patience import PATIENCE


@dataclass
class Watch:
    """Everything that a page was seen doing."""

    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def everything(self) -> list[str]:
        return [*self.console, *self.errors, *self.dialogs, *self.requests]

    def on(self, page: Any, own: str) -> None:
        """Listen to `page`; `own` is the one address that it may ask for."""

        def asked(request: Any) -> None:
            if request.url.split("#")[0] != own and not request.url.startswith("data:"):
                self.requests.append(request.url)

        def spoke(dialog: Any) -> None:
            self.dialogs.append(dialog.message)
            dialog.dismiss()

        page.on("request", asked)
        page.on("dialog", spoke)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))

    def until(self, page: Any, seen: Callable[[], object]) -> None:
        """Let the page go on until that was seen of it. AssertionError if it never is."""
        end = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < end, f"only seen: {self.everything}"
            page.wait_for_timeout(20)


Opener = Callable[..., tuple[Any, Watch]]


@contextmanager
def opening(browser: Any) -> Iterator[Opener]:
    """What opens a file as a reader would; its pages are closed behind it."""
    with ExitStack() as stack:

        def opener(
            path: Path, *, width: int = 1280, scheme: str = "light", script: bool = True
        ) -> tuple[Any, Watch]:
            size = {"width": width, "height": 800}
            context = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script)
            stack.callback(context.close)
            page, watch = context.new_page(), Watch()
            page.set_default_timeout(1000 * PATIENCE)
            watch.on(page, path.as_uri())
            page.goto(path.as_uri(), wait_until="load")
            return page, watch

        yield opener
