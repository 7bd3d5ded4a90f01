"""The commands that README and docs show: found, their placeholders filled, made small enough to run."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preftune.config import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_SPAN = re.compile(r"`(preftune [^`]+)`")
_STARTS = ("preftune ", "make ", "python ", "pip ", "ACCELERATE_USE_CPU=", "docker ")
TRAINING = ("run", "train")
ALONE = ("selftest", "options", "version", "--version", "doctor")  # say something without arguments


@dataclass(frozen=True, slots=True)
class Command:
    """A line of a page, without its comment."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def bare(self) -> bool:
        """A command that is named without its arguments."""
        named = all(word.startswith("-") for word in self.words[2:])
        return self.words[0] == "preftune" and named and self.verb not in ALONE

    @property
    def verb(self) -> str:
        """The command of preftune, or nothing for a line of another program."""
        words = [word for word in self.words[1:] if word != "--debug"]
        return words[0] if self.words[0] == "preftune" and words else ""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands() -> list[Command]:
    """Every command of every page once: lines of code blocks, and code spans that begin with `preftune`."""
    found = {}
    for page in PAGES:
        for text in _texts(page.read_text(encoding="utf-8")):
            bare = re.sub(r"\s+#\s.*", "", text)
            bare = re.sub(r" \[[^\]]*\](\.\.\.)?", "", bare).strip()  # [OPTION]: may be left out
            if "COMMAND" not in bare:
                found.setdefault(bare, Command(page.relative_to(ROOT).as_posix(), bare))
    return list(found.values())


def _texts(page: str) -> Iterator[str]:
    blocks = [body for kind, body in _FENCE.findall(page) if kind in ("", "sh", "bash")]
    indented = re.findall(r"(?:^ {4}\S.*\n)(?:^ {4}.*\n)*", _FENCE.sub("", page), re.M)
    for block in [*blocks, *indented]:
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith(_STARTS):
                yield " ".join(line.split())
    for span in _SPAN.findall(_FENCE.sub("", page)):
        yield span.replace("\\|", "|")


def python_blocks() -> list[tuple[str, str]]:
    """Page and text of every block of Python."""
    return [
        (page.relative_to(ROOT).as_posix(), body)
        for page in PAGES
        for kind, body in _FENCE.findall(page.read_text(encoding="utf-8"))
        if kind == "python"
    ]


def filled(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The words with PATH, RUN, DIR and the like replaced, longest names first."""
    result = []
    for word in words:
        for name in sorted(places, key=len, reverse=True):
            word = re.sub(
                rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", lambda _, name=name: places[name], word
            )
        result.append(word)
    return result


def small(recipe: str, overrides: Sequence[str], pairs: str, model: str) -> list[str]:
    """Settings to put behind `overrides` so that a run takes seconds and no network."""
    config = load_recipe(recipe, overrides).config
    words = [
        "precision=float32",
        "checkpoint.every=50",
        "evaluation.prompts=4",
        "evaluation.max_new_tokens=4",
    ]
    words += ["evaluation.resamples=20", "evaluation.samples=2", "evaluation.pool=4"]
    if config.model.scratch is not None:
        words += ["model.scratch.steps=2", "model.scratch.batch_size=4"]
    else:
        words += [f"model.base={model}", "data.form=transcript"]
        words += ["data.max_prompt_length=40", "data.max_response_length=16"]
    words += ["data.pairs=60"] if config.data.name == "world" else [f"data.name={pairs}"]
    if config.data.data_dir is not None and not any(word.startswith("data.name=") for word in overrides):
        words += [
            "data.data_dir=none"
        ]  # of the hub's data set; a user's own file has to do without by itself
    for name, stage in config.stage.items():
        size, known = max(4, 2 * stage.items_per_row), type(stage).model_fields
        less = {
            "rows": size,
            "steps": 1,
            "epochs": 1,
            "minibatches": 1,
            "max_new_tokens": 4,
            "batch_size": size,
        }
        words += [f"stage.{name}.{key}={value}" for key, value in less.items() if key in known]
    return words
