"""The plan of a run as text: its graph of stages, and every value with its origin."""

from preftune.config.graph import BASE, stage_order, stages_until
from preftune.config.load import Resolved
from preftune.config.run import ModelConfig
from preftune.config.schema import settings
from preftune.config.toml import flatten, toml_value


def show_plan(resolved: Resolved, until: str | None = None) -> str:
    """What a run would do: the stages in running order, then all settings. For `--dry-run`; runs nothing.

    With `until`, only that stage and what it needs, without evaluation.
    """
    return f"{show_graph(resolved, until)}\n\n{show_values(resolved)}"


def show_graph(resolved: Resolved, until: str | None = None) -> str:
    """One line per stage in running order: name, algorithm, where it starts, how much it does."""
    config = resolved.config
    order = stages_until(config.stage, until) if until else stage_order(config.stage)
    wide = max(len(name) for name in [BASE, *order])
    lines = [f"run {config.name} (recipe {resolved.recipe}), data {config.data.name}, seed {config.seed}"]
    lines.append(f"  {BASE:<{wide}}  {_base(config.model)}")
    stages = [(name, config.stage[name]) for name in order]
    lines += [f"  {name:<{wide}}  {stage.algorithm:<6}  {stage.plan()}" for name, stage in stages]
    if until is None:
        lines.append(f"  then: every policy on {config.evaluation.prompts} held-out prompts, and the report")
    return "\n".join(lines)


def show_values(resolved: Resolved) -> str:
    """All settings by section, each with its origin; those too that config.toml leaves out at their defaults,
    so that the keys of older runs stay what they were.
    """
    values, origins = flatten(resolved.config.model_dump()), dict(resolved.origins)
    for key, setting in settings({n: s.algorithm for n, s in resolved.config.stage.items()}).items():
        path = key.split(".")
        absent = any(values.get(".".join(path[:i]), ...) is None for i in range(1, len(path)))
        if key not in values and not absent and setting.default not in (..., {}):
            values[key], origins[key] = setting.default, "default"
    sections: dict[str, list[str]] = {}
    for key in values:
        sections.setdefault(key.rpartition(".")[0], []).append(key)
    lines = []
    for section, keys in sections.items():
        lines.append(f"[{section or 'run'}]")
        rows = [(key.rpartition(".")[2], toml_value(values[key]), origins[key]) for key in keys]
        width = max(len(name) for name, _, _ in rows)
        value_width = max(len(value) for _, value, _ in rows)
        lines += [f"  {name:<{width}} = {value:<{value_width}}  {origin}" for name, value, origin in rows]
    return "\n".join(lines)


def _base(model: ModelConfig) -> str:
    if model.scratch is None:
        return model.base
    size = model.scratch
    return f"trained from scratch: {size.layers} layers, {size.width} wide, {size.steps} updates"
