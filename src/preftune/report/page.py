"""report.html: one file, no script, no requests. All strings are escaped, figures are data: images."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preftune.report.blocks import Section
from preftune.report.claims import verdict_parts
from preftune.report.text import MAX_QUOTE, Code, clean, name
from preftune.report.view import RunView

TEMPLATES = Path(__file__).parent / "templates"


def page_text(run: RunView, sections: Iterable[Section], pictures: Mapping[str, str]) -> str:
    """The whole page. `pictures` maps figure files to SVG text."""
    # autoescape=True, not select_autoescape: that one leaves files of an unknown suffix unescaped.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = lambda text: clean(text, None)
    environment.filters["quote"] = lambda text: clean(str(text).strip("\n"), MAX_QUOTE)
    environment.tests["code"] = lambda text: isinstance(text, Code)
    template = environment.get_template("report.html")
    return template.render(
        title=name(run.name),
        verdict=verdict_parts(run),
        sections=tuple(sections),
        images={file: data_image(svg) for file, svg in pictures.items()},
    )


def data_image(svg: str) -> str:
    """An SVG as the address of an image. An image runs no script and loads nothing, whatever it holds."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"
