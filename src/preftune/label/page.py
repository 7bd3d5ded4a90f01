"""The one page: served, or as a file that holds a rater's items and needs no server.

All text goes into it as text: the script sets `textContent`, and the file's items stand, escaped by jinja2,
in an element that no browser runs.
"""

import json
from functools import cache
from pathlib import Path

from preftune.label.store import Store, slot_fields
from preftune.report.writers.page import content_policy, environment_of
from preftune.rundir import write_text

TEMPLATES = Path(__file__).parent / "templates"
SERVED_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@cache
def asset(name: str) -> str:
    """label.js or label.css, as it is sent."""
    return environment_of(TEMPLATES).get_template(name).render()


def served_page() -> str:
    """The page without anything in it: the script asks for what it shows."""
    return environment_of(TEMPLATES).get_template("label.html").render(policy="", data="")


def write_file(store: Store, rater: str, path: Path) -> None:
    """Write the page as one file with the whole list of `rater`, blind as the served one."""
    data = {
        "set": store.design.items_sha256,
        "rater": rater,
        "tags": list(store.design.tags),
        "slots": [slot_fields(slot) for slot in store.slots(rater)],
    }
    policy = content_policy(asset("label.js"), asset("label.css"))
    text = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    write_text(path, environment_of(TEMPLATES).get_template("label.html").render(policy=policy, data=text))
