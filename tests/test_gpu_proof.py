"""The kit of `make gpu-proof`: its commands fit the recipes, it goes on where it was cut off, and it carries
along what a machine without a network lacks. All of it, tiny, runs by `make gpu-proof REHEARSE=DIR`.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import beside
import measure
import proof
import wheels
from preftune.config import load_recipe

ON = {"device": "cpu", "card": "none", "torch": "2"}


def commands(out: Path, small: bool) -> list[proof.Command]:
    return [each for part in proof.PARTS.values() for each in part(out, Path("data"), small)]


@pytest.mark.parametrize("small", [True, False])
def test_every_recipe_of_the_kit_has_what_it_needs(small: bool, tmp_path: Path) -> None:
    """The settings are the recipe's, and where it has no data of its own, some are given."""
    recipes = set()
    for _, words, environment in commands(tmp_path, small):
        if "run" not in words:
            continue
        recipe, *given = words[words.index("run") + 1 :]
        config = load_recipe(recipe, [word for word in given if "=" in word]).config
        assert config.data.name, recipe
        recipes.add(recipe)
        if recipe == "sentiment":
            assert environment["PREFTUNE_REVIEWS"] == config.data.name
        if not small and recipe == "hh-smollm2":
            assert config.stage["ppo"].steps == 60
    assert recipes == {"tiny", "hh-smollm2", "sentiment", "hh-colab"} | (set() if small else {"quickstart"})
    kinds = {words[1] for _, words, _ in commands(tmp_path, small) if words[0].endswith("measure.py")}
    assert all(hasattr(measure, kind) for kind in kinds)


def carried_out(
    folder: Path, record: dict[str, Any], on: dict[str, str] = ON, seconds: float = 60
) -> list[str]:
    """What ran, of three commands of which the second fails until there is a file."""
    ran = folder / "ran"
    ran.write_text("")
    note = f"open({str(ran)!r}, 'a').write"
    given: list[proof.Command] = [
        ("one", ["-c", f"{note}('one ')"], {}),
        ("two", ["-c", f"{note}('two '); open({str(folder / 'there')!r})"], {}),
        ("three", ["-c", f"import os; {note}(os.environ['WORD'])"], {"WORD": "three "}),
    ]
    well = proof.carry_out("a", given, record, on, lambda: None, folder / "site")
    assert well == all(entry["ok"] for entry in record["commands"].values())
    return ran.read_text().split()


def test_what_went_well_is_not_done_again_and_the_rest_is(tmp_path: Path) -> None:
    record: dict[str, Any] = {"commands": {}}
    assert carried_out(tmp_path, record) == ["one", "two", "three"]
    assert record["commands"]["a two"]["code"] == 1
    assert "No such file" in record["commands"]["a two"]["said"]
    (tmp_path / "there").touch()
    assert carried_out(tmp_path, json.loads(json.dumps(record))) == ["two"]
    assert carried_out(tmp_path, record, ON | {"card": "another"}) == ["one", "two", "three"]
    assert re.search(r"\| a \| two \| yes \| .* \| another \| 2 \| ", proof.page(record, tmp_path))


def test_a_part_ends_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PART_SECONDS", 1)
    record: dict[str, Any] = {"commands": {}}
    slow: proof.Command = ("slow", ["-c", "import time; time.sleep(60)"], {})
    assert not proof.carry_out("a", [slow], record, ON, lambda: None, tmp_path)
    assert "goes on" in record["commands"]["a slow"]["said"]


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert (page == proof.page({"commands": {}}, tmp_path)) == ("Never run" in page)


def a_wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"version = {version!r}\n" + "#" * 300)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
    return file


def test_packages_that_are_missing_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there stays, one of another Python is left, and a damaged part is named."""
    monkeypatch.setattr(wheels, "PART", 100)
    files = [a_wheel(tmp_path, name) for name in ("not_here", "torch")]
    other = a_wheel(tmp_path, "elsewhere")
    files.append(other.rename(tmp_path / "elsewhere-1.0-cp27-cp27m-win32.whl"))
    kit, site = tmp_path / "kit", tmp_path / "site"
    wheels.pack(kit, files)
    assert max(part.stat().st_size for part in kit.glob("*.part*")) <= 100
    assert wheels.unpack(kit, site) == ["not-here 1.0"]
    assert (site / "not_here" / "__init__.py").is_file()
    assert {path.name.split("-")[0].split("_")[0] for path in site.iterdir()} == {"not"}
    part = kit / "not_here-1.0-py3-none-any.whl.part01"
    part.write_bytes(b"?" + part.read_bytes()[1:])
    assert wheels.unpack(kit, site) == ["not-here 1.0"]  # it is there already
    with pytest.raises(SystemExit, match="damaged"):
        wheels.unpack(kit, tmp_path / "other")
    assert wheels.unpack(tmp_path / "none", site) == []


def test_what_is_too_old_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.metadata, "version", lambda name: "0.1")
    assert wheels._lacks("accelerate")
    assert not wheels._lacks("some-other")


def test_first_gradients_are_compared_stage_by_stage(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("device", "cpu")]
    for run, norm in zip(runs, (2.0, 2.1), strict=True):
        for stage, own in (("sft", 1.0), ("ppo", norm)):
            (run / "stages" / stage).mkdir(parents=True)
            (run / "stages" / stage / "metrics.jsonl").write_text(f'{{"loss": 0.5, "grad_norm": {own}}}\n')
    words = [str(run) for run in runs]
    found = measure.gradients(words)
    assert found["ok"]  # what samples may differ in a token
    assert not found["near"]["ppo: grad_norm"]
    (runs[0] / "stages/sft/metrics.jsonl").write_text('{"loss": 0.5, "grad_norm": 1.1}\n')
    assert not measure.gradients(words)["ok"]


def test_half_precision_is_measured_and_a_wrong_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.precision(["--small"])["ok"]
    usual = measure.logprobs_and_entropy

    def rounded(layer: Any, states: Any, *more: Any) -> Any:
        return usual(layer, states.bfloat16().float() * 1.01, *more)

    monkeypatch.setattr(measure, "logprobs_and_entropy", rounded)
    assert not measure.precision(["--small"])["ok"]


def test_memory_of_the_other_side_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a card of which 3 GiB are taken: a model of one more, and 2 at work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, gib in {"memory_allocated": 3, "max_memory_allocated": 6}.items():
        monkeypatch.setattr(torch.cuda, name, lambda gib=gib: gib << 30)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert beside.peak_gib(lambda: "done", beside.held_gib()) == ("done", 3.0)


def test_updates_are_timed_beside_trl_and_say_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for TRL that is faster, and one that does other work."""
    card = {"FLOP/s": 1e12, "bytes/s": 1e11}

    def other(stage: str, make: Any, rows: dict[str, Any], half: bool) -> dict[str, Any]:
        assert set(rows) == {"prompt", "chosen"}
        return {"installed": True, "seconds an update": 0.0, "first loss": 9.0}

    assert "profile" not in measure.update("sft", "small", "float32", card)
    monkeypatch.setattr(measure, "trl", other)
    found = measure.update("sft", "small", "float32", card)
    assert found["profile"]
    assert 0 < found["share of the limit"] < 1
    monkeypatch.setattr(measure, "sampling", lambda *_: {})
    monkeypatch.setattr(measure, "limits", lambda *_: card)
    monkeypatch.setattr(measure, "update", lambda *_: found)
    assert not measure.speed(["small"])["ok"]
