"""Text of others in a model card: it stays text, and the metadata is what was put in."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from damages import session
from preftune.rundir import RunDir
from preftune.runs.cards import _metadata, model_card
from preftune.runs.stages import Stage
from sweeps import ALL

HEADINGS = ["Data", "Recipe", "Measured", "Limits", "How to load"]
# What breaks out of YAML, Markdown or HTML, between any other text.
PIECES = st.sampled_from(
    [
        *("---", "\n---\n", "\nlicense: mit\n", "\r\n", "\u2028", "\x85", "`", "```", "````", "\n## Data\n"),
        *("<script>alert(1)</script>", "](javascript:alert(1))", "|", "'", '"', ": ", "!!python/object:os."),
        *("{{", "%", "&a", "*a", "/", "@", "\ud800", "\x00", "\x1b[2J", "\u202e", "null", "- x"),
    ]
)
FOREIGN = st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=8).map("".join)


@pytest.mark.parametrize("algorithm", ["sft", "reward"])
@settings(max_examples=250 if ALL else 100, deadline=None, derandomize=True, database=None)
@given(base=FOREIGN, data=FOREIGN, source=FOREIGN, reason=FOREIGN, setting=FOREIGN)
@example("owner/model.v1", "owner/data_set", "all", "too long", "gold")
@example("a/b\n---\nlicense: mit", "a/b\n---\nlicense: mit", "`\n\n## Data\n", "```\n# x", "```\n## Data\n")
def test_a_card_keeps_its_metadata_and_its_headings(
    algorithm: str, base: str, data: str, source: str, reason: str, setting: str
) -> None:
    report = {
        "splits": {"train": 3},
        "sources": {"train": {source: 3}},
        "rejected": {reason: 1},
        "rows_read": 4,
    }
    made = session(RunDir(Path("/nonexistent")), base, data, report)
    stage = Stage(
        name="sft",
        algorithm=algorithm,
        parents=("base",),
        inputs={"settings": {"reward_functions": setting}},
    )
    text = model_card(made, stage)
    wanted = _metadata(made, stage, [])
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == wanted
    card = ModelCard(text)  # the hub's own reader
    assert card.data.to_dict() == wanted
    assert re.findall(r"^## *(.*)$", body, re.MULTILINE) == HEADINGS
    outside = re.sub(r"```json\n.*?\n```\n|```python\n.*?\n```\n", "", body, flags=re.DOTALL)
    outside = re.sub(r"(`+)[^\n]*?[^`]\1(?!`)", "", outside)
    assert "<script" not in outside
    assert "javascript:" not in outside
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", wanted.get("base_model", "owner/model.v1"), re.ASCII)
