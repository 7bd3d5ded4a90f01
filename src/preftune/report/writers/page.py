"""report.html: one file, no requests. All strings are escaped, figures are data: images.

The one script and the one style sheet are files of this package; the page's policy admits them by their hash
and nothing else, so that no text of a data set or model can become either. Without the script all is visible.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preftune.report.blocks import Section
from preftune.report.sentences import summary
from preftune.report.text import MAX_QUOTE, Code, clean, name
from preftune.report.view import RunView

TEMPLATES = Path(__file__).parent.parent / "templates"


def page_text(run: RunView, sections: Iterable[Section], pictures: Mapping[str, str]) -> str:
    """The whole page. `pictures` maps figure files to SVG text."""
    return page_of(name(run.name), summary(run), sections, pictures, beside="ANALYSIS.md")


def page_of(
    title: str, verdict: str, sections: Iterable[Section], pictures: Mapping[str, str], *, beside: str
) -> str:
    """A page with a sentence under its title. `beside`: the file that says the same, if there is one."""
    environment = environment_of(TEMPLATES)
    style, script = (environment.get_template(file).render() for file in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        title=title,
        summary=verdict,
        beside=beside,
        sections=tuple(sections),
        images={file: data_image(svg) for file, svg in pictures.items()},
        policy=content_policy(script, style),
    )


@cache
def environment_of(folder: Path) -> Environment:
    """The templates of a folder."""
    # autoescape=True, not select_autoescape: that one leaves files of an unknown suffix unescaped.
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = lambda text: clean(text, None)
    environment.filters["quote"] = lambda text: clean(str(text).strip("\n"), MAX_QUOTE)
    environment.filters["stacked"] = stacked
    environment.tests["code"] = lambda text: isinstance(text, Code)
    return environment


def content_policy(script: str, style: str) -> str:
    """What the page may do: run this script, use this style sheet, show images that it holds itself."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def stacked(cell: str) -> tuple[str, str]:
    """`0.41 [0.22, 0.60]` in two: the number and its interval, which the page sets under it."""
    text, bracket, interval = clean(cell, None).partition(" [")
    return (text, f"[{interval}") if bracket and interval.endswith("]") else (clean(cell, None), "")


def data_image(svg: str) -> str:
    """An SVG as the address of an image. An image runs no script and loads nothing, whatever it holds."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"
