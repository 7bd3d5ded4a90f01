"""Questions to an endpoint that works, and to one that fails in every way; verdicts in what it says."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_server import Fault, Model, serving
from preftune.errors import ConfigError, InputMissing
from preftune.judges import endpoint
from preftune.judges.endpoint import Endpoint, StoppedError
from preftune.judges.llm import question, read_template, verdict

KEY = "not-a-known-form-4711"
REQUEST = {"model": "judge-1b", "messages": [{"role": "user", "content": "Which?"}]}


@pytest.fixture
def model() -> Iterator[Model]:
    with serving(Model(judge=lambda question: f"[[A]] says {KEY}")) as model:
        yield model


def asked(model: Model, **more: object) -> Endpoint:
    return Endpoint(**{"url": model.url, "retries": 2, **more})  # type: ignore[arg-type]


def test_an_answer_comes_with_its_tokens_and_the_key_goes_only_there(model: Model) -> None:
    answer = asked(model, key=KEY).ask(REQUEST)
    assert (answer.text, answer.model) == ("[[A]] says [redacted]", "judge-1b")
    assert (answer.tokens_in, answer.tokens_out) == (1, 3)
    assert model.paths == ["/v1/chat/completions"]
    assert model.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert model.asked == [REQUEST]
    assert "Authorization" not in (asked(model).ask(REQUEST), model.headers[1])[1]
    assert KEY not in repr(asked(model, key=KEY))


OFTEN: list[Fault] = [
    (500, {}, b"{}"),
    (503, {}, b"busy"),
    (429, {"Retry-After": "0"}, b"{}"),
    (429, {"Retry-After": "Sat, 28 Nov 2026 10:00:00 GMT", "Date": "Sat, 28 Nov 2026 10:00:00 GMT"}, b"{}"),
    (200, {}, b"<html>"),
    (200, {}, b"[" * 100_000),
    (200, {}, b'{"choices": []}'),
    (200, {}, b"[1]"),
    (200, {}, b"\xff\xfe"),
    (200, {}, b" " * (endpoint.MAX_BODY + 1)),
    "closed",
    "truncated",
    "endless",
]


@pytest.mark.parametrize("fault", OFTEN, ids=lambda fault: repr(fault)[:60])
def test_what_may_pass_is_asked_again(model: Model, fault: Fault) -> None:
    model.faults = [fault]
    who = asked(model)
    assert who.ask(REQUEST).text.startswith("[[A]]")
    assert len(model.asked) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((500, {}, b'{"error": {"message": "no memory left"}}'), "it says 500: no memory left"),
        ((200, {}, b"<html>"), "its answer is no chat completion: '<html>'"),
        ("truncated", "its answer is no chat completion"),
        ("endless", "its answer has more than 1,048,576 bytes"),
        ("closed", "Remote end closed connection without response"),
    ],
)
def test_what_does_not_pass_ends_it_and_is_named(model: Model, fault: Fault, message: str) -> None:
    model.faults = [fault] * 3
    with pytest.raises(InputMissing, match=r"asked 3 times") as caught:
        asked(model).ask(REQUEST)
    assert message in caught.value.message
    assert model.url in caught.value.message
    assert len(model.asked) == 3


def test_one_that_is_down_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputMissing, match=rf"127\.0\.0\.1:{port}/v1: .*refused.* \(asked 1 time\)"):
        Endpoint(url=f"http://127.0.0.1:{port}/v1", retries=0).ask(REQUEST)


def test_a_time_limit_is_one_of_the_whole_answer_however_it_drips(model: Model) -> None:
    model.faults = ["drip"]
    with pytest.raises(InputMissing, match=r"no whole answer within 0\.3 s"):
        asked(model, timeout=0.3, retries=0).ask(REQUEST)


def test_one_that_never_answers_has_the_same_limit(model: Model) -> None:
    model.hold = threading.Event()
    with pytest.raises(InputMissing, match=r"no whole answer within 0\.2 s"):
        asked(model, timeout=0.2, retries=0).ask(REQUEST)


def test_a_server_is_left_alone_as_long_as_it_says_but_not_for_ever(model: Model) -> None:
    waited: list[float] = []
    model.faults = [(429, {"Retry-After": "7"}, b"{}"), (503, {}, b""), (429, {"Retry-After": "9000"}, b"")]
    who = asked(model, retries=5)
    who._ended.wait = lambda seconds: bool(waited.append(seconds))  # type: ignore[method-assign,assignment]
    with pytest.raises(InputMissing, match=r"it says 429, and asks to wait 9000 s \(asked 3 times\)"):
        who.ask(REQUEST)
    assert waited == [7.0, 2 * endpoint.FIRST_WAIT]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_no_key_goes_along(model: Model, status: int) -> None:
    with serving() as other:
        model.faults = [(status, {"Location": f"{other.url}/chat/completions"}, b"")]
        with pytest.raises(ConfigError, match=rf"sends one on to 127\.0\.0\.1:{other.port}; that is not"):
            asked(model, key=KEY).ask(REQUEST)
        assert not other.asked


def test_proxies_of_the_environment_are_not_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert asked(model).ask(REQUEST).text


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_no_use_to_repeat_is_not_and_shows_no_key(model: Model, status: int) -> None:
    told = f'{{"error": {{"message": "no such thing for {KEY}\\u001b[2J"}}}}'
    model.faults = [(status, {}, told.encode())]
    with pytest.raises(ConfigError, match=rf"{status}.*no such thing for \[redacted\]⟨U\+001B⟩") as caught:
        asked(model, key=KEY, key_variable="JUDGE_KEY").ask(REQUEST)
    assert KEY not in str(caught.value)
    assert len(model.asked) == 1


def test_a_question_that_the_server_will_not_have_is_an_answer_of_its_own(model: Model) -> None:
    model.faults = [(400, {}, b'{"error": "longer than the context"}')]
    answer = asked(model).ask(REQUEST)
    assert (answer.refused, answer.text) == ("400: longer than the context", "")


@pytest.mark.parametrize("content", ["null", "7", '["[[A]]"]', '""'])
def test_an_empty_answer_is_one(model: Model, content: str) -> None:
    body = f'{{"choices": [{{"message": {{"content": {content}}}}}], "usage": {{"prompt_tokens": -1}}}}'
    model.faults = [(200, {}, body.encode())]
    answer = asked(model).ask(REQUEST)
    assert (answer.text, answer.model, answer.tokens_in) == ("", "", 0)


def test_no_server_is_asked_again_at_once(model: Model) -> None:
    """`Retry-After: 0` says that one may ask, not that one should at once."""
    waited: list[float] = []
    model.faults = [(503, {"Retry-After": "0"}, b"")] * 4
    who = asked(model, retries=3)
    who._ended.wait = lambda seconds: bool(waited.append(seconds))  # type: ignore[method-assign,assignment]
    with pytest.raises(InputMissing, match=r"it says 503 \(asked 4 times\)"):
        who.ask(REQUEST)
    assert waited == [endpoint.FIRST_WAIT * n for n in (1, 2, 4)]


def test_an_answer_that_was_cut_says_so(model: Model) -> None:
    assert not asked(model).ask(REQUEST).cut
    model.ended = "length"
    assert asked(model).ask(REQUEST).cut


def test_stopping_ends_what_waits_for_an_answer(model: Model) -> None:
    model.hold = threading.Event()
    who, ended = asked(model), list[BaseException]()

    def ask() -> None:
        try:
            who.ask(REQUEST)
        except StoppedError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert model.held.wait(300)
    who.stop()
    thread.join(300)
    assert len(ended) == 1


# --- the question and the verdict ---------------------------------------------------------------------------


def test_a_question_is_filled_in_once_whatever_the_texts_hold() -> None:
    text = question("{prompt}|{first}|{second}|{other}", "{first}", "{second} {prompt}", "{0}")
    assert text == "{first}|{second} {prompt}|{0}|{other}"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Both are fine. [[A]]", "first"),
        ("[[B]]", "second"),
        ("[[c]]", "tie"),
        ("[[ tie ]]", "tie"),
        ("If A is better I say [[A]], and it is not:\n[[B]]\n", "second"),
        ("A", "first"),
        ("Some words.\nVerdict: **B**", "second"),
        ("The first is better.\nFinal answer is B.", None),
        ("Answer: tie", "tie"),
        ("A or B?", None),
        ("", None),
        ("Both are good", None),
        ("[A]", "first"),
        ("A" * 300, None),
        ("answer " * 100_000, None),
        ("<think>Is it [[A]] or [[B]]?</think>\nNeither.", None),
        ("<think>[[A]]</think> <think>[[B]]</think>\n[[C]]", "tie"),
        ("If so, [[A]].</think>\nB", "second"),
        ("<think>It may be [[A]]", None),
    ],
)
def test_a_verdict_is_read_or_there_is_none(answer: str, expected: str | None) -> None:
    assert verdict(answer) == expected


def test_the_shipped_template_holds_the_three_texts_once() -> None:
    text = read_template(None)
    assert [text.count(f"{{{name}}}") for name in ("prompt", "first", "second")] == [1, 1, 1]
    assert verdict(text.strip()) == "tie"  # the marks are spelt as they are read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{prompt} {first}", r"lacks \{second\}"),
        (b"\xff{prompt}{first}{second}", r"not UTF-8 text \(byte 0\)"),
        (b"{prompt}{first}{second}" + b" " * 70_000, r"more than 65,536 bytes"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_template(str(file))
    with pytest.raises(InputMissing, match=r"cannot read .*none\.txt: No such file"):
        read_template(str(tmp_path / "none.txt"))
