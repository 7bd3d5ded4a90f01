"""The page over HTTP: what it answers, and what it refuses."""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from label_run import begun, collected, sampled
from starlette.testclient import TestClient

import prose
from preftune.label.server import LIMIT, make_app
from preftune.label.store import Store

PORT = 8321
HERE = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return begun(sampled(tmp_path, n=12), raters=["anna", "ben"], tags=["brief"])


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(make_app(store, store.tokens(), PORT), base_url=HERE) as client:
        yield client


def of(store: Store, rater: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {store.tokens()[rater]}"}


def said(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": secrets.token_hex(8), "slot": state["slot"]["key"], "verdict": "a"} | more


def test_a_rater_judges_undoes_and_goes_on(store: Store, client: TestClient) -> None:
    anna = of(store, "anna")
    state = client.get("/api/state", headers=anna).json()
    assert (state["rater"], state["done"], state["total"], state["tags"]) == ("anna", 0, 13, ["brief"])
    first = said(state, tags=["brief"], note="n", corrected="c", seconds=2)
    after = client.post("/api/judge", headers=anna, json=first).json()
    assert after["done"] == 1
    assert after["slot"] != state["slot"]
    assert client.post("/api/judge", headers=anna, json=first).json() == after
    back = client.post("/api/undo", headers=anna, json={"id": "0" * 16, "of": after["last"]}).json()
    assert back["slot"] == state["slot"]
    assert back["before"]["note"] == "n"
    assert client.get("/api/state", headers=of(store, "ben")).json()["done"] == 0


def test_a_second_tab_is_told_and_shown_what_comes_next(store: Store, client: TestClient) -> None:
    anna = of(store, "anna")
    state = client.get("/api/state", headers=anna).json()
    after = client.post("/api/judge", headers=anna, json=said(state)).json()
    other = client.post("/api/judge", headers=anna, json=said(state, verdict="b"))
    assert other.status_code == 409
    assert other.json() == after


def test_results_are_the_owners_alone(store: Store, client: TestClient) -> None:
    found = client.get("/api/state", headers=of(store, "")).json()["results"]
    first = found["rows"][0][0]
    assert first.startswith("policy_dpo is preferred")
    prose.compare("label/label_server: the first of the results", first)
    assert "results" not in client.get("/api/state", headers=of(store, "anna")).json()
    state = client.get("/api/state", headers=of(store, "anna")).json()
    assert client.post("/api/judge", headers=of(store, ""), json=said(state)).status_code == 403


@pytest.mark.parametrize("sent", [None, "Bearer x", "Bearer ", "Basic x", "Bearer é"])
def test_without_the_secret_nothing_is_told(client: TestClient, sent: str | None) -> None:
    headers = {} if sent is None else {"Authorization": sent.encode("utf-8")}
    assert client.get("/api/state", headers=headers).status_code == 401
    assert client.get("/").status_code == 200  # the empty page
    assert "Question" not in client.get("/").text


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", "", "[::1]:8321"]
)
def test_another_hosts_name_is_refused(store: Store, client: TestClient, host: str) -> None:
    """DNS rebinding: a name of somebody else's that leads here."""
    answer = client.get("/api/state", headers={**of(store, "anna"), "Host": host})
    assert answer.status_code == 421
    assert "slot" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{PORT + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_post_from_another_site_is_refused(
    store: Store, client: TestClient, headers: dict[str, str]
) -> None:
    state = client.get("/api/state", headers=of(store, "anna")).json()
    answer = client.post("/api/judge", headers={**of(store, "anna"), **headers}, json=said(state))
    assert answer.status_code == 403
    assert client.get("/api/state", headers=of(store, "anna")).json()["done"] == 0
    own = {**of(store, "anna"), "Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/judge", headers=own, json=said(state)).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_what_a_form_can_send_is_refused(store: Store, client: TestClient, kind: str) -> None:
    body = json.dumps(said(client.get("/api/state", headers=of(store, "anna")).json()))
    answer = client.post("/api/judge", headers={**of(store, "anna"), "Content-Type": kind}, content=body)
    assert answer.status_code == 415


def test_large_bodies_are_refused_with_and_without_a_length(store: Store, client: TestClient) -> None:
    anna = {**of(store, "anna"), "Content-Type": "application/json"}
    assert client.post("/api/judge", headers=anna, content=b" " * (LIMIT + 1)).status_code == 413
    assert (
        client.post("/api/judge", headers={**anna, "Content-Length": "9" * 5000}, content=b"").status_code
        == 413
    )
    assert client.post("/api/judge", headers={**anna, "Content-Length": "-1"}, content=b"").status_code == 413
    parts = (b" " * 65536 for _ in range(4))
    assert client.post("/api/judge", headers=anna, content=parts).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        *("/../items.jsonl", "/..%2f..%2fitems.jsonl", "/%2e%2e/design.json", "/items.jsonl", "/.links.json"),
        *(
            "//etc/passwd",
            "/etc/passwd",
            "/label.js/",
            "/label.js%00",
            "/static/label.js",
            "/api",
            "/api/state/",
        ),
        *("/favicon.ico", "/api/results", "/..\\items.jsonl"),
    ],
)
def test_no_other_path_leads_anywhere(store: Store, client: TestClient, path: str) -> None:
    answer = client.get(path, headers=of(store, "anna"))
    assert answer.status_code == 404
    assert "Question" not in answer.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(store: Store, client: TestClient, method: str) -> None:
    assert client.request(method, "/api/judge", headers=of(store, "anna")).status_code == 405
    assert client.request(method, "/", headers=of(store, "anna")).status_code == 405


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"[" * 100000, b"\xff\xfe", b'{"verdict": "a"}'),
        *(b'{"id": "12345678", "slot": "../../etc/passwd-0", "verdict": "a"}',),
        *(b'{"id": "12345678", "slot": "0000000000000000-0", "verdict": "maybe"}',),
        *(b'{"id": "12345678", "slot": "0000000000000000-0", "verdict": "a", "rater": "ben"}',),
        *(b'{"id": "12345678", "slot": "0000000000000000-0", "verdict": "a", "note": "\\ud800"}',),
        *(b'{"id": "12345678", "slot": "0000000000000000-0", "verdict": "a", "seconds": NaN}',),
    ],
)
def test_a_body_that_is_no_judgement_is_refused(store: Store, client: TestClient, body: bytes) -> None:
    headers = {**of(store, "anna"), "Content-Type": "application/json"}
    assert client.post("/api/judge", headers=headers, content=body).status_code in (400, 422)
    assert not store.file("anna").exists()


def test_every_answer_carries_the_policy(store: Store, client: TestClient) -> None:
    answers = [client.get("/"), client.get("/label.js"), client.get("/nothing"), client.get("/api/state")]
    answers.append(client.get("/", headers={"Host": "evil.example"}))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
        assert "set-cookie" not in answer.headers
    page = client.get("/").text
    assert page.count("<script") == 1  # '<script src="/label.js">'
    assert 'src="/label.js"' in page
    assert " on" not in page.replace(" one", "").replace(" or", "")


def test_a_full_disk_is_told_and_the_judgement_can_be_sent_again(
    store: Store, client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    anna = of(store, "anna")
    state = client.get("/api/state", headers=anna).json()
    first = said(state)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = client.post("/api/judge", headers=anna, json=first)
    assert answer.status_code == 500
    assert answer.headers["content-security-policy"]
    assert "No space left" in capsys.readouterr().err
    assert client.get("/api/state", headers=anna).json() == state
    assert client.post("/api/judge", headers=anna, json=first).json()["done"] == 1
    assert Store(store.folder).state("anna")["done"] == 1


def test_text_of_others_is_sent_as_json_only(tmp_path: Path) -> None:
    run = collected(tmp_path, n=1)
    path = tmp_path / "collected/pairs/replies.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace("Reply", "</script><img src=x onerror=hit()>"), "utf-8"
    )
    store = begun(run)
    with TestClient(make_app(store, store.tokens(), PORT), base_url=HERE) as client:
        answer = client.get("/api/state", headers=of(store, "me"))
    assert answer.headers["content-type"] == "application/json"
    assert "</script><img" in answer.json()["slot"]["a"]
