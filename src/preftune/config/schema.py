"""The settings as a flat list of dotted keys: one definition for parsing, overrides, options and docs."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from preftune.config.algorithms import stage_kinds
from preftune.config.run import RunConfig

STAGE = "stage"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key that takes a value."""

    key: str
    field: FieldInfo
    default: Any  # ... where a value is required

    @property
    def optional(self) -> bool:
        """Whether `none` is a value."""
        return NoneType in get_args(self.field.annotation)

    @property
    def expected(self) -> str:
        """What a value must be, in words: "a whole number >= 1", "a number > 0 or none"."""
        return _words(self.field.annotation, self.field.metadata)

    @property
    def kind(self) -> type | None:
        """int, float, bool or str; None for a choice among literals."""
        for part in _members(self.field.annotation):
            part = get_args(part)[0] if get_origin(part) is Annotated else part
            if part in (int, float, bool, str):
                return part
        return None


_SIGNS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))


def settings(stages: Mapping[str, str]) -> dict[str, Setting]:
    """All settings of a run whose stages have these algorithms: {"sft": "sft", "rm": "reward"}."""
    found = {item.key: item for item in walk(RunConfig, "")}
    for name, algorithm in stages.items():
        found |= {item.key: item for item in walk(stage_kinds()[algorithm], f"{STAGE}.{name}.")}
    return found


def walk(model: type[BaseModel], prefix: str, defaults: BaseModel | None = None) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        key = prefix + name
        if key == STAGE:
            continue
        default = getattr(defaults, name) if defaults else _default(field)
        group = _group(field.annotation)
        if group is None:
            yield Setting(key, field, default)
        else:
            yield from walk(group, f"{key}.", default)


def _default(field: FieldInfo) -> Any:
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _group(annotation: Any) -> type[BaseModel] | None:
    """The settings model behind an annotation (`ScratchConfig | None`), if it is one."""
    for part in _members(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _words(annotation: Any, metadata: Iterable[Any]) -> str:
    parts = _members(annotation)
    if len(parts) > 1:
        return " or ".join("none" if part is NoneType else _words(part, metadata) for part in parts)
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        return _words(annotation, [*inner, *metadata])
    if get_origin(annotation) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(annotation))
    if get_origin(annotation) is dict:
        return "a table of values by name"
    word = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    return word + _bounds(metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    found = []
    for item in metadata:
        # A constraint given through an alias such as Count is a FieldInfo that holds further ones.
        for rule in item.metadata if isinstance(item, FieldInfo) else [item]:
            found += [
                f"{sign} {getattr(rule, name):g}" for kind, name, sign in _SIGNS if isinstance(rule, kind)
            ]
    return " " + " and ".join(found) if found else ""


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid key that was probably meant, or None.

    Tried in turn: initials (`lr` for `learning_rate`), spelling within the same section, spelling of the
    whole key where there is no such section, and the last part in any section.
    """
    known = list(valid)
    section, _, last = key.rpartition(".")
    siblings = {
        tail: other for other in known for head, _, tail in [other.rpartition(".")] if head == section
    }
    for tail, other in siblings.items():
        if "_" in tail and "".join(word[0] for word in tail.split("_")) == last:
            return other
    if close := difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.6):
        return siblings[close[0]]
    if not siblings and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.75)):
        return close[0]
    tails = {other.rpartition(".")[2]: other for other in reversed(known)}
    close = difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)
    return tails[close[0]] if close else None
