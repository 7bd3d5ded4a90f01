"""Chat templates are programs of somebody else: they end in time and in bounded memory, or in an error."""

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import CHAT, make_tokenizer

from preftune.data import Encoder, parse_prompt, template
from preftune.data.template import Template
from preftune.errors import DataError

MESSAGES = [{"role": "user", "content": "Hi \u00e9 \U0001f600"}, {"role": "assistant", "content": "Yes"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "walk up the classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "1e8 characters": "{{ 'x' * 100000000 }}",
    "1e10 characters": "{{ 'x' * 10000000000 }}",
    "doubled 60 times": "{% set n = namespace(x='x') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide filter": "{{ 'a' | center(1000000000) }}",
    "a long list": "{{ [0] * 1000000000 }}",
    "nested loops": LOOP,
    "only after a long prompt": "{% if messages[0].content | length > 5 %}" + LOOP + "{% endif %}",
    "range(1e9)": "{% for i in range(1000000000) %}x{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a file": "{% include '/etc/passwd' %}",
    "not a template": "{% for",
    "refusal": "{{ raise_exception('no') }}",
}


def tokenizer(template: str) -> Any:
    made = make_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")  # noqa: S106
    made.chat_template = template
    return made


def resident() -> int:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error_in_time_and_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 1)
    encoder = Encoder(tokenizer(HOSTILE[name]), "chat", 64, 64)
    before, began = resident(), time.monotonic()
    with pytest.raises(DataError, match="chat template") as caught:
        encoder.prompt(parse_prompt("Hi there"))
    assert time.monotonic() - began < 60  # it is given 1, of users 4
    assert caught.value.code == 65
    assert "data.form=transcript" in caught.value.hint
    del encoder  # its child is waited for, so that its memory is known
    assert resident() - before < 30
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10 < before + 300


def test_it_renders_what_the_library_renders() -> None:
    made = tokenizer(CHAT)
    expected = made.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    template = Template(made)
    assert [template.fill(MESSAGES) for _ in range(3)] == [expected] * 3


def test_after_a_failure_the_next_prompt_is_rendered() -> None:
    made = tokenizer("{% if messages[0].content == 'bad' %}" + "{{ 'x' * 10000000000 }}" + "{% endif %}ok")
    template = Template(made)
    assert template.fill([{"role": "user", "content": "good"}]) == "ok"
    with pytest.raises(DataError):
        template.fill([{"role": "user", "content": "bad"}])
    assert template.fill([{"role": "user", "content": "good"}]) == "ok"


def test_an_interrupted_request_leaves_no_answer_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        def readline(self) -> bytes:
            raise KeyboardInterrupt

    own, ask = Template(tokenizer("{{ messages[0].content }}")), template._ask
    with monkeypatch.context() as patch:
        patch.setattr(template, "_ask", lambda pipes, *asked: ask((pipes[0], Interrupting()), *asked))
        with pytest.raises(KeyboardInterrupt):
            own.fill([{"role": "user", "content": "first"}])
    assert own.fill([{"role": "user", "content": "second"}]) == "second"


def test_a_child_that_was_killed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = Template(tokenizer("{% if messages[0].content == 'slow' %}" + LOOP + "{% endif %}ok"))
    with monkeypatch.context() as patch:
        patch.setattr(template, "SECONDS", 1)
        with pytest.raises(DataError, match="takes over 1 s"):
            filled.fill([{"role": "user", "content": "slow"}])
    assert filled.fill([{"role": "user", "content": "fast"}]) == "ok"


def test_threads_get_their_own_answers() -> None:
    template, answers = Template(tokenizer("{{ messages[0].content }}")), dict[int, str]()

    def ask(i: int) -> None:
        answers[i] = template.fill([{"role": "user", "content": str(i)}])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: str(i) for i in range(20)}


def test_the_child_leaves_with_its_template_and_holds_nothing_open(tmp_path: Path) -> None:
    before = children()
    with (tmp_path / "held").open("w"):
        template = Template(tokenizer("ok"))
        template.fill(MESSAGES)
        (child,) = children() - before
        files = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
        assert len(files) == 2
        assert all(file.startswith("pipe:") for file in files)
    del template
    assert not children() - before


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
