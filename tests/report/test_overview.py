"""`report --all`: one page over runs says what each gained and which one setting made two of them differ."""

import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic import make_run, unscored

import prose
from preftune.cli import main
from preftune.rundir import RunDir, read_json, write_json, write_text


def cells(page: str, key: str) -> list[list[str]]:
    """Rows of the table of a section, without markup."""
    section = page.split(f'<section id="{key}">')[1].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.S)
    return [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)
        ]
        for row in rows
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for run, seed, change in (("one", 3, ""), ("two", 3, "kl_coef = 0.5\n"), ("three", 4, "kl_coef = 0.5\n")):
        made = make_run(runs / run, gold={"policy_ppo": -0.3})
        text = made.config.read_text().replace("seed = 3", f"seed = {seed}")
        write_text(made.config, text.replace('algorithm = "ppo"\n', f'algorithm = "ppo"\n{change}'))
    (runs / "notes").mkdir()
    return runs


def test_every_policy_of_every_run_has_its_gain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--all", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "runs.html")
    rows = cells((folder / "runs.html").read_text(), "gains")
    ppo = [row for row in rows if row[1:2] == ["PPO"]]
    assert [row[0] for row in ppo] == ["one", "three", "two"]
    assert all(row[2].startswith("+0.50 [0.30, 0.70]") and row[3] == "better" for row in ppo)
    assert all(row[4].startswith("-0.30") for row in ppo)
    assert {row[5] for row in ppo} == {"worse"}  # better by score, worse by gold: both verdicts stand there
    assert all("over-optimisation" in row[7] for row in ppo)
    assert "notes" not in {row[0] for row in rows}


def test_what_the_doctor_finds_beside_the_policies_has_a_row_of_its_own(tmp_path: Path) -> None:
    """A reward model at chance, and one that has evaluated no policy at all."""
    make_run(tmp_path / "one", accuracy=0.5)
    alone = make_run(tmp_path / "two", accuracy=0.5)
    for path in (alone.comparisons, *alone.evaluations.glob("[bp]*.json")):
        path.unlink()
    make_run(tmp_path / "well")
    assert main(["report", "--all", str(tmp_path)]) == 0
    rows = cells((tmp_path / "runs.html").read_text(), "gains")[1:]
    beside = {row[0]: row[-1] for row in rows if row[1] == "–"}
    assert set(beside) == {"one", "two"}
    assert all("reward model at chance" in found for found in beside.values())


def test_a_run_without_a_reward_model_has_its_gains_by_gold(tmp_path: Path) -> None:
    unscored(make_run(tmp_path / "one", gold={"policy_dpo": 0.2}))
    assert main(["report", "--all", str(tmp_path)]) == 0
    (row,) = cells((tmp_path / "runs.html").read_text(), "gains")[1:]
    assert row[1:6] == ["DPO", "–", "–", "+0.200 [0.150, 0.250]", "better"]


def test_settings_that_differ_and_pairs_that_differ_in_one(folder: Path) -> None:
    assert main(["report", "--all", str(folder)]) == 0
    page = (folder / "runs.html").read_text()
    assert cells(page, "settings")[1:] == [["seed", "3", "4", "3"], ["stage.ppo.kl_coef", "–", "0.5", "0.5"]]
    single = cells(page, "single")[1:]
    assert {(row[0], row[1], row[2]) for row in single} == {
        ("stage.ppo.kl_coef", "one", "two"),
        ("seed", "three", "two"),
    }
    (ppo,) = [row for row in single if row[0].startswith("stage") and row[5] == "PPO"]
    assert ppo[3:5] == ["–", "0.5"]
    assert ppo[6] == ppo[7] == "+0.50 [0.30, 0.70]"


def test_a_run_that_cannot_be_read_is_named_and_hides_no_other(folder: Path) -> None:
    write_text(folder / "two" / "config.toml", "not toml [")
    (folder / "three" / "config.toml").unlink()
    shutil.copytree(folder / "one", folder / "four")
    write_text(folder / "four" / "config.toml", "")
    write_text(folder / "five" / "config.toml", "seed = 3\n")
    assert main(["report", "--all", str(folder)]) == 0
    page = (folder / "runs.html").read_text()
    unread = {row[0]: row[1] for row in cells(page, "unread")[1:]}
    assert "not valid TOML" in unread.pop("two")
    assert set(unread) == {"three", "four", "five"}
    prose.compare(
        "report/overview: runs that cannot be read", *(f"{name}: {unread[name]}" for name in unread)
    )
    assert {row[0] for row in cells(page, "gains")[1:]} == {"one"}


def test_names_of_strangers_are_text(folder: Path) -> None:
    (folder / "one").rename(folder / "<script>alert(1)<")
    assert main(["report", "--all", str(folder)]) == 0
    assert "<script>alert" not in (folder / "runs.html").read_text()


def test_without_runs_or_without_a_name_it_says_what_to_do(tmp_path: Path) -> None:
    assert main(["report", "--all", str(tmp_path)]) == 66
    assert main(["report"]) == 64


def test_a_column_has_as_many_decimals_in_every_row(folder: Path) -> None:
    """Gains and KL whose intervals support different decimals, in one run and over runs."""
    compared = RunDir(folder / "two").comparisons
    rows = [json.loads(line) for line in compared.read_text().splitlines()]
    for row in rows:
        row["interval"] = [row["mean"] - 0.002, row["mean"] + 0.002]
    compared.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    policy = RunDir(folder / "three").evaluation("policy_ppo")
    record = read_json(policy)
    record["kl_sequence"] = {"mean": 123.4, "interval": [103.0, 143.0]}
    write_json(policy, record)
    assert main(["report", "--all", str(folder)]) == 0
    page = (folder / "runs.html").read_text()
    for key, columns in (("gains", (2, 4, 6)), ("single", (6, 7))):
        for i in columns:
            shown = [row[i] for row in cells(page, key)[1:]]
            decimals = {len(found) for cell in shown for found in re.findall(r"\d\.(\d+)", cell)}
            assert len(decimals) == 1, shown
