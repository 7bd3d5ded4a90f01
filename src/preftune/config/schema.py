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
        for member in _members(self.field.annotation):
            member = get_args(member)[0] if get_origin(member) is Annotated else member
            if member in (int, float, bool, str):
                return member
        return None


_SIGNS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))


def settings(stages: Mapping[str, str]) -> dict[str, Setting]:
    """All settings of a run whose stages have these algorithms: {"sft": "sft", "rm": "reward"}."""
    by_key = {item.key: item for item in walk(RunConfig, "")}
    for name, algorithm in stages.items():
        by_key |= {item.key: item for item in walk(stage_kinds()[algorithm], f"{STAGE}.{name}.")}
    return by_key


def walk(model: type[BaseModel], prefix: str, defaults: BaseModel | None = None) -> Iterator[Setting]:
    """The settings of a model, those of its groups after its own."""
    fields = [(name, field, _group(field.annotation)) for name, field in model.model_fields.items()]
    for name, field, group in sorted(fields, key=lambda entry: entry[2] is not None):
        key = prefix + name
        if key == STAGE:
            continue
        default = getattr(defaults, name) if defaults else _default(field)
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
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def _words(annotation: Any, metadata: Iterable[Any]) -> str:
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join("none" if member is NoneType else _words(member, metadata) for member in members)
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
    bounds = []
    for item in metadata:
        # A constraint given through an alias such as Count is a FieldInfo that holds further ones.
        for rule in item.metadata if isinstance(item, FieldInfo) else [item]:
            bounds += [
                f"{sign} {getattr(rule, name):g}" for kind, name, sign in _SIGNS if isinstance(rule, kind)
            ]
    return " " + " and ".join(bounds) if bounds else ""


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid key that was probably meant, or None.

    Tried in turn: initials (`lr` for `learning_rate`), spelling within the same section, spelling of the
    whole key where there is no such section, and the last part in any section.
    """
    keys = list(valid)
    section, _, last = key.rpartition(".")
    siblings = {
        tail: existing for existing in keys for head, _, tail in [existing.rpartition(".")] if head == section
    }
    for tail, existing in siblings.items():
        if "_" in tail and "".join(word[:1] for word in tail.split("_")) == last:
            return existing
    if close := difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.6):
        return siblings[close[0]]
    if not siblings and (close := difflib.get_close_matches(key, keys, n=1, cutoff=0.75)):
        return close[0]
    tails = {existing.rpartition(".")[2]: existing for existing in reversed(keys)}
    close = difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)
    return tails[close[0]] if close else None
