"""origins.json: which settings the recipe made, which the command line, as the report shows them."""

from pathlib import Path

from preftune.config import dump_toml, load_recipe
from preftune.report.load import load_run
from preftune.rundir import RunDir, write_text
from preftune.runs.provenance import record_origins


def test_a_run_records_where_its_settings_come_from(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "stages").mkdir()
    record_origins(run, load_recipe("tiny", ["stage.ppo.kl_coef=0.2"]))
    view = load_run(run)
    assert view.recipe == "tiny"
    assert view.origins["stage.ppo.kl_coef"] == "command line"
    assert view.origins["stage.ppo.algorithm"] == "recipe"
    assert view.origins["stage.ppo.gamma"] == "default"


def test_the_last_command_is_what_counts(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "stages").mkdir()
    record_origins(run, load_recipe("tiny", ["seed=4"]))
    record_origins(run, load_recipe("tiny"))
    assert load_run(run).origins["seed"] != "command line"


def test_a_runs_own_config_does_not_make_everything_the_recipes(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "stages").mkdir()
    resolved = load_recipe("tiny", ["seed=4"])
    record_origins(run, resolved)
    write_text(run.config, dump_toml(resolved.config))
    record_origins(run, load_recipe(str(run.config)))
    assert load_run(run).origins["seed"] == "command line"
