"""Reward functions by name: how a recipe writes them, and where Python finds them. Imports no torch.

    reward_functions = "preftune.world.gold:gold"                        one function, weight 1
    reward_functions = "0.4 * preftune.world.gold:gold + -0.1 * mine:words"   several, weighted

A name is `module:function`; the module is imported as Python would, the current directory included.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from preftune.config.base import comma_text, words_in
from preftune.errors import ConfigError, InputMissing
from preftune.hashing import sha256_file
from preftune.isolated import isolated, passes

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TERM = re.compile(rf"(?:(?P<weight>[-+0-9.eE]+)\s*\*\s*)?(?P<name>{_NAME.pattern})")
EXAMPLE = "0.5 * module:function + other:function"
OF_EVERY_ROW = ("ended", "source", "row", "chosen", "rejected")  # columns that a function may take
NO_COLUMNS = ("prompt", "response", "prompts", "completions", "completion_ids", "trainer_state")
ALL_COLUMNS = "**"  # a function that takes every column


def reward_terms(text: str) -> dict[str, float]:
    """Weights by function name, in the order written. ValueError for text that is no weighted sum."""
    terms: dict[str, float] = {}
    for term in re.split(r"\s\+\s", text.strip()):
        match = _TERM.fullmatch(term.strip())
        try:
            weight = float(match["weight"] or 1) if match else 0.0
        except ValueError:
            weight = 0.0
        if match is None or weight == 0 or weight in (float("inf"), float("-inf")):
            raise ValueError(f"{term.strip()!r} is no weighted function; write it like {EXAMPLE!r}")
        if match["name"] in terms:
            raise ValueError(f"{match['name']} occurs twice in {text!r}; give it one weight")
        terms[match["name"]] = weight
    return terms


def _is_a_sum(text: str) -> str:
    reward_terms(text)
    return text


RewardTerms = Annotated[str, Field(min_length=1), AfterValidator(_is_a_sum)]


def judges_in(text: str | None) -> tuple[str, ...]:
    """The judges of a setting that may name several, with commas: functions, or directories of reward models.
    ValueError for what is neither.
    """
    judges = words_in(text)
    for judge in judges:
        if ":" in judge:
            reward_terms(judge)
        elif "/" not in judge:
            raise ValueError(f'{judge!r} is no judge: "module:function", or a directory with a slash: ./DIR')
    if len(set(judges)) < len(judges):
        raise ValueError(f"a judge occurs twice in {text!r}")
    return judges


def _are_judges(text: str) -> str:
    judges_in(text)
    return text


Judges = Annotated[str, Field(min_length=1), BeforeValidator(comma_text), AfterValidator(_are_judges)]


def _are_functions(text: str) -> str:
    for name in words_in(text):
        if not _NAME.fullmatch(name):
            raise ValueError(f'{name!r} is no function; write "module:function", several with commas')
    judges_in(text)
    return text


Functions = Annotated[str, Field(min_length=1), BeforeValidator(comma_text), AfterValidator(_are_functions)]


def find_function(name: str) -> Callable[..., Any]:
    """The function behind `module:function`. InputMissing or ConfigError, naming it, if there is none.

    Importing runs the module's code: name only what you would run yourself.
    """
    module_name, _, path = name.partition(":")
    package = module_name.partition(".")[0]  # to look for a module inside it would import it
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the console script, unlike `python -m`, leaves it out
    try:
        if module_name not in sys.modules and importlib.util.find_spec(package) is not None:
            importlib.import_module("torch")  # first, so that what the module sets in it can be put back
        with isolated():
            function: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputMissing(
            f"reward function {name}: no module {error.name!r}",
            hint="a module in the current directory, or an installed one",
        ) from error
    except BaseException as error:  # whatever the module does when it is imported, exit() included
        if passes(error):
            raise
        raise ConfigError(
            f"reward function {name}: importing its module fails with {type(error).__name__}: {error}",
            hint=f"python -c 'import {module_name}' shows where",
        ) from error
    for attribute in path.split("."):
        function = getattr(function, attribute, None)
    if not callable(function):
        raise ConfigError(f"reward function {name}: {module_name} has no function {path!r}")
    return function


def columns_of(call: Callable[..., Any], *, required: bool = False) -> tuple[str, ...]:
    """The names that a function takes besides prompt and response, with `required` those without a default;
    "**" where it takes all.
    """
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return ()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    whole_batch = any(p.name == "completions" for p in named)
    named = named if whole_batch else named[2:] if len(named) >= 2 else named
    names = [p.name for p in named if not required or p.default is p.empty]
    return (*names, *([ALL_COLUMNS] if any(p.kind is p.VAR_KEYWORD for p in parameters) else []))


def source_hashes(terms: str) -> dict[str, str]:
    """SHA-256 of the file behind each function: a stage made with an edited function is another stage."""
    files = {name: source_file(name) for name in reward_terms(terms)}
    return {name: sha256_file(file) if file else "built in" for name, file in files.items()}


def source_file(name: str) -> Path | None:
    """The file behind a function, None for one that is built in."""
    module = inspect.getmodule(find_function(name))
    file = Path(getattr(module, "__file__", None) or "")
    return file if file.is_file() else None
