"""From a recipe and overrides to a checked RunConfig, with the origin of every value.

Recipes are TOML files shipped with the package, or any .toml path. Overrides are `dotted.key=value`, read by
the type of their key. Mistakes become errors that name the key, the value and what was expected.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from preftune.config.algorithms import stage_kinds
from preftune.config.run import RunConfig
from preftune.config.schema import STAGE, Setting, nearest, settings, walk
from preftune.config.toml import flatten, toml_value, unflatten
from preftune.config.unused import refuse_unused
from preftune.errors import ConfigError, UsageError, did_you_mean, no_bare_text
from preftune.untrusted import passes_credential, redact

Origin = Literal["default", "recipe", "command line"]
Model = TypeVar("Model", bound=BaseModel)
SCRATCH = "model.scratch"
TABLE = "data.template_arguments"  # the one setting whose keys are the user's


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A config, what it was made from, and where each of its values comes from."""

    config: RunConfig
    origins: Mapping[str, Origin]  # by dotted key, for all that the config's dump has
    recipe: str  # name or path as given


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("preftune") / "recipes"
    return sorted(file.name[: -len(".toml")] for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), *, spared: Sequence[str] = ()) -> Resolved:
    """Read a recipe by name or .toml path and apply `key=value` overrides; the last of equal keys wins.

    `stage.NAME=none` leaves a stage out; `stage.NAME.algorithm=...` adds one. Raises UsageError for an
    unknown recipe or an override without "=", ConfigError for everything that is wrong with keys and values,
    but for `spared`, those of the overrides that need have no use.
    """
    recipe = str(recipe)
    no_bare_text("overrides", overrides)
    resolved, typed = _resolve(_read_recipe(recipe), [_split_override(text) for text in overrides], recipe)
    free = {_split_override(text)[0] for text in spared}
    refuse_unused(resolved.config, (key for key in typed if key not in free))
    return resolved


def build(model: type[Model], values: Mapping[str, Any], where: str = "") -> Model:
    """A settings model from keyword values, with preftune's errors: `build(DPOConfig, {"beta": 0.2})`."""
    prefix = f"{where}." if where else ""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        schema = {item.key: item for item in walk(model, prefix)}
        raise _explain(error, schema, prefix) from None


def config_hash(config: BaseModel) -> str:
    """SHA-256 of all values of a settings model, as hex. Equal configs have equal hashes."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_recipe(recipe: str) -> dict[str, Any]:
    """The recipe's values by dotted key."""
    if recipe.endswith(".toml"):
        source: Any = Path(recipe)
        if not source.is_file():
            raise UsageError(f"no recipe file at {recipe}", f"shipped recipes: {', '.join(recipe_names())}")
    elif recipe in recipe_names():
        source = resources.files("preftune") / "recipes" / f"{recipe}.toml"
    else:
        names = ", ".join(recipe_names())
        if (settings_of_run := Path(recipe) / "config.toml").is_file():
            raise UsageError(f"{recipe} is a run, no recipe", f"its settings are one: {settings_of_run}")
        question = did_you_mean(recipe, recipe_names())
        raise UsageError(
            f"unknown recipe {recipe!r}", f"{question}recipes: {names}; or give a path to a .toml file"
        )
    try:
        return flatten(tomllib.loads(source.read_text(encoding="utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe} is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{recipe} is not valid TOML: brackets are nested too deep") from None
    except OSError as error:
        raise ConfigError(f"cannot read {recipe}: {error.strerror}") from None


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not key.strip():
        raise UsageError(f"cannot read {text!r} as key=value", "for example: stage.ppo.learning_rate=1e-6")
    return key.strip(), value.strip()


def _resolve(
    recipe: dict[str, Any], overrides: list[tuple[str, str]], source: str
) -> tuple[Resolved, list[str]]:
    """The settings, and the keys that are typed with values other than their defaults."""
    written = _drop(recipe, overrides)
    typed = [(key, value) for key, value in overrides if not _removes(key, value)]
    schema = settings(_algorithms(written, typed, source))
    in_templates = [key for key in (*written, *dict(typed)) if key.startswith(f"{TABLE}.")]
    schema |= {key: replace(schema[TABLE], key=key) for key in in_templates}
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for key, value in written.items():
        # dump_toml writes an absent model.scratch as "none".
        if (value == {} and _is_section(key, schema)) or (key == SCRATCH and value == "none"):
            continue
        if key not in schema:
            _refuse_key(key, schema, f"in {source}")
        values[key] = None if _is_none(schema[key], value) else value
        origins[key] = "recipe"
    for key, text in typed:
        if key not in schema:
            _refuse_key(key, schema, "on the command line")
        values[key] = _convert(schema[key], text)
        origins[key] = "command line"
    _refuse_secrets(values)
    try:
        config = RunConfig.model_validate(unflatten(values))
    except ValidationError as error:
        raise _explain(error, schema, "", origins, source) from None
    _require_data(config, source)
    keys: dict[str, Origin] = {key: _origin(key, origins) for key in flatten(config.model_dump())}
    changed_keys = [key for key in dict(typed) if values[key] not in (None, schema[key].default)]
    return Resolved(config=config, origins=keys, recipe=source), changed_keys


def _origin(key: str, origins: Mapping[str, Origin]) -> Origin:
    """Where a value comes from: that of a stage's copy for a later round from where the stage's own does."""
    section, _, in_section = key.partition(".")
    name, _, setting = in_section.partition(".")
    is_copy = section == STAGE and f"{STAGE}.{name}.algorithm" not in origins
    first = f"{STAGE}.{name.rpartition('-')[0]}.{setting}" if is_copy else key
    return origins.get(key) or origins.get(first, "default")


def _refuse_secrets(values: Mapping[str, Any]) -> None:
    """Settings go into files that are shown and shared, so no credential may be one."""
    for key, value in values.items():
        if isinstance(value, str) and passes_credential(value):
            raise ConfigError(
                f"{key} = {_value_text(redact(value))}: holds what looks like a password or token",
                "settings are written to files that people share; log in with `hf auth login`, "
                "or put the token into the variable HF_TOKEN",
            )


def _removes(key: str, value: str) -> bool:
    """Whether an override leaves out a group: `stage.grpo=none`, `model.scratch=none`."""
    return value.lower() == "none" and (
        key == SCRATCH or (key.startswith(f"{STAGE}.") and key.count(".") == 1)
    )


def _drop(recipe: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """The recipe's values without the groups that overrides leave out."""
    gone = [key for key, value in overrides if _removes(key, value)]
    stages = {".".join(key.split(".")[:2]) for key in recipe if key.startswith(f"{STAGE}.")}
    for group in gone:
        if group != SCRATCH and group not in stages:
            _refuse_key(group, stages, "on the command line")
    base = dict(overrides).get("model.base")
    if base not in (None, "scratch"):
        gone.append(SCRATCH)  # another base was asked for, so the recipe's size of a scratch model has no use
    return {
        key: value
        for key, value in recipe.items()
        if not any(f"{key}.".startswith(f"{group}.") for group in gone)
    }


def _algorithms(values: Mapping[str, Any], overrides: list[tuple[str, str]], source: str) -> dict[str, str]:
    """The algorithm of every stage that any key mentions."""
    merged: dict[str, Any] = {**values, **dict(overrides)}
    names = dict.fromkeys(key.split(".")[1] for key in merged if key.startswith(f"{STAGE}."))
    algorithms = {}
    for name in names:
        key = f"{STAGE}.{name}.algorithm"
        choices = " | ".join(f'"{choice}"' for choice in stage_kinds())
        if key not in merged:
            _refuse_stage(name, [n for n in names if f"{STAGE}.{n}.algorithm" in merged], choices)
        if merged[key] not in list(stage_kinds()):  # a list also takes values that cannot be hashed
            where = "on the command line" if key in dict(overrides) else f"in {source}"
            raise ConfigError(f"{key} = {_value_text(merged[key])} ({where}): expected {choices}")
        algorithms[name] = merged[key]
    return algorithms


def _refuse_stage(name: str, named: list[str], choices: str) -> None:
    near = nearest(name, named)
    hint = f"did you mean stage.{near}? " if near else ""
    raise ConfigError(
        f"stage.{name} has no algorithm",
        f"{hint}stages: {', '.join(named) or 'none yet'}; a new one needs stage.{name}.algorithm = {choices}",
    )


def _is_section(key: str, keys: Iterable[str]) -> bool:
    return key == STAGE or any(existing.startswith(f"{key}.") for existing in keys)


def _refuse_key(key: str, keys: Iterable[str], where: str) -> None:
    """Raise for a key that is no setting."""
    keys = list(keys)
    if _is_section(key, keys):
        inside = sorted(
            {existing[len(key) + 1 :].split(".")[0] for existing in keys if existing.startswith(f"{key}.")}
        )
        raise ConfigError(
            f"{key} is a group of settings, not a value ({where})",
            f"keys: {', '.join(inside)}" if inside else "`preftune options` lists all keys",
        )
    near = nearest(key, keys)
    hint = f"did you mean {near}?" if near else "`preftune options` lists all keys"
    raise ConfigError(f"unknown key {key} ({where})", hint)


def _is_none(setting: Setting, value: Any) -> bool:
    return setting.optional and isinstance(value, str) and value.lower() == "none"


def _convert(setting: Setting, text: str) -> Any:
    """Override text as the key's type; text that does not fit is left for validation to refuse."""
    if _is_none(setting, text):
        return None
    if setting.key.startswith(f"{TABLE}."):
        return _untyped(text)
    try:
        if setting.kind in (int, float):
            return setting.kind(text)
    except ValueError:
        return text
    if setting.kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


def _untyped(text: str) -> bool | int | float | str:
    """A value of a setting that may have any type, as the same text in a recipe would be read."""
    for kind in (int, float):
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(text)):
                return number
    return {"true": True, "false": False}.get(text.lower(), text)


def _require_data(config: RunConfig, source: str) -> None:
    if config.data.name is None:
        raise ConfigError(
            f"{source} needs preference data: data.name=PATH is required",
            "PATH is a file (.jsonl, .csv, .parquet, ...) or a directory of preference pairs, or a hub id",
        )


def _explain(
    error: ValidationError,
    schema: Mapping[str, Setting],
    prefix: str = "",
    origins: Mapping[str, str] | None = None,
    source: str = "",
) -> ConfigError:
    """pydantic's complaints in preftune's words, at most five."""
    lines = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        key = prefix + ".".join(path)
        origin = (origins or {}).get(key, "")
        where = f" (in {source})" if origin == "recipe" else f" (on the {origin})" if origin else ""
        if item["type"] == "value_error":
            lines.append(f"{key}{': ' if path else ''}{item.get('ctx', {}).get('error', item['msg'])}")
        elif item["type"] == "missing":
            lines.append(f"{key} is required" + (f" (in {source})" if source.endswith(".toml") else ""))
        elif item["type"] == "extra_forbidden":
            near = nearest(key, schema)
            lines.append(f"unknown key {key}" + (f", did you mean {near}?" if near else ""))
        else:
            expected = schema[key].expected if key in schema else item["msg"]
            lines.append(f"{key} = {_value_text(item['input'])}{where}: expected {expected}")
    more = f"\nand {len(lines) - 5} more" if len(lines) > 5 else ""
    return ConfigError("\n".join(lines[:5]) + more)


def _value_text(value: Any) -> str:
    text = toml_value(value) if isinstance(value, str | bool | int | float) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
