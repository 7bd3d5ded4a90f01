"""The command as a process: killed, asked by hand over a socket, started twice."""

import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from label_run import collected
from label_server import Served

from preftune.cli import main
from preftune.rundir import RunDir, read_json, read_jsonl


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run = collected(tmp_path_factory.mktemp("served"))
    served = Served(run.path, "--rater", "anna", "--rater", "ben")
    yield served
    served.kill()


def test_what_was_said_to_be_saved_is_there_after_every_kill(served: Served) -> None:
    """Killed between any two judgements, and while one is under way: sent again, it counts once."""
    told: list[tuple[str, str]] = []
    state = served.api("anna", "/api/state")[1]
    for place, verdict in enumerate(["a", "b", "tie", "bad", "skip", "a"]):
        said = {"id": secrets.token_hex(16), "slot": state["slot"]["key"], "verdict": verdict}
        assert served.api("anna", "/api/judge", said)[0] == 200
        told.append((said["slot"], verdict))
        if place in (1, 4):
            served.kill()
            served.start()
        status, state = served.api("anna", "/api/judge", said)  # as after an answer that got lost
        assert (status, state["done"]) == (200, place + 1)
    rows = read_jsonl(RunDir(served.run).labels("pairs") / "anna.judgements.jsonl", whole=True)
    assert [(f"{row['item']}-{int(row['again'])}", row["verdict"]) for row in rows] == told


def test_a_real_server_refuses_the_same(served: Served) -> None:
    token = served.links["ben"].partition("#")[2]
    head = f"Host: 127.0.0.1:{served.port}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n"
    for path in ("/../items.jsonl", "/..%2f.links.json", "//etc/passwd", "/labels/pairs/items.jsonl", "/%00"):
        status, body = served.ask(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())
        assert status == 404
        assert b"Question" not in body
    foreign = head.replace("127.0.0.1", "evil.example")
    assert served.ask(f"GET /api/state HTTP/1.1\r\n{foreign}\r\n".encode())[0] == 421
    assert (
        served.ask(f"GET /api/state HTTP/1.1\r\n{head}Origin: http://evil.example\r\n\r\n".encode())[0] == 403
    )
    post = f"POST /api/judge HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
    assert served.ask(f"{post}Content-Length: 99999999\r\n\r\n".encode())[0] == 413
    assert served.api("ben", "/api/state")[1]["done"] == 0


def test_it_listens_on_this_machine_only(served: Served) -> None:
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", served.port)) != 0  # loopback too, but another address


def test_a_second_server_of_the_set_is_told_who_has_it(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", str(served.run), "--port", "0"]) == 73
    assert f"is in use by process {served.process.pid}" in capfd.readouterr().err
    assert main(["label", str(served.run), "--results"]) == 0  # reading asks for no lock


def test_the_commands_around_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(collected(tmp_path, n=4).path)
    page, back, out = (str(tmp_path / name) for name in ("page.html", "back.json", "out.jsonl"))
    assert main(["label", run, "--rater", "anna", "--rater", "ben", "--html", page]) == 64
    assert main(["label", run, "--rater", "anna", "--html", page]) == 0
    text = Path(page).read_text(encoding="utf-8")
    assert "Question 3?" in text
    assert "http" not in text.replace("http-equiv", "")
    assert main(["label", run, "--export", out]) == 65
    slots = read_slots(tmp_path)
    said = [{"id": f"0000000{i}", "slot": slot, "verdict": "a"} for i, slot in enumerate(slots)]
    design = read_json(RunDir(tmp_path).labels("pairs") / "design.json")
    Path(back).write_text(
        f'{{"set": "{design["items_sha256"]}", "rater": "anna", "judgements": {said}}}'.replace("'", '"'),
        "utf-8",
    )
    assert main(["label", run, "--import", back]) == 0
    assert main(["label", run, "--results", "--export", out]) == 0
    shown = capsys.readouterr().out
    assert "4 new judgements" in shown
    assert "anna: 4 items" in shown
    assert "out.jsonl: 4 pairs" in shown
    assert len(read_jsonl(Path(out))) == 4


def test_a_rater_named_twice_is_one(tmp_path: Path) -> None:
    run = collected(tmp_path, n=4)
    anna = ["--rater", "anna", "--rater", "anna", "--overlap", "0"]
    assert main(["label", str(run.path), *anna, "--html", str(tmp_path / "page.html")]) == 0
    assert read_json(run.labels("pairs") / "design.json")["raters"] == ["anna"]


@pytest.mark.parametrize(
    "words", [["--import", "x"], ["--html", "x"], ["--rater", "ben"], ["--overlap", "0"]]
)
def test_what_results_would_pass_over_is_refused(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = collected(tmp_path, n=4)
    assert main(["label", str(run.path), "--html", str(tmp_path / "page.html")]) == 0
    assert main(["label", str(run.path), "--results", *words]) == 64
    assert "change nothing" in capsys.readouterr().err


def test_port_0_is_one_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = list[int]()
    monkeypatch.setattr("preftune.label.server.serve", lambda app, port: served.append(port))
    assert main(["label", str(collected(tmp_path, n=4).path), "--port", "0"]) == 0
    assert served[0] > 0
    assert f"http://127.0.0.1:{served[0]}/#" in capsys.readouterr().out


def read_slots(run: Path) -> list[str]:
    rows = read_jsonl(RunDir(run).labels("pairs") / "items.jsonl")
    return [f"{row['id']}-0" for row in rows]


def test_nothing_is_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = collected(tmp_path / "run", n=4)
    (tmp_path / "elsewhere").mkdir()
    run.labels("pairs").parent.mkdir()
    run.labels("pairs").symlink_to(tmp_path / "elsewhere")
    assert main(["label", str(run.path), "--html", str(tmp_path / "page.html")]) == 78
    assert "is a link" in capsys.readouterr().err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_without_the_extra_it_says_what_to_install_and_a_file_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(collected(tmp_path, n=4).path)
    for name in [*(name for name in sys.modules if name.startswith("preftune.label.server")), "uvicorn"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["label", run, "--html", str(tmp_path / "page.html")]) == 0
    assert main(["label", run]) == 69
    assert "pip install 'preftune[label]'" in capsys.readouterr().err
