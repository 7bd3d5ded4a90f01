"""What reaches a terminal, a log or a file: no control characters, no credentials."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.config import load_recipe
from preftune.errors import ConfigError
from preftune.report.text import markdown
from preftune.runs.console import Console
from preftune.untrusted import REDACTED, clean, holds_credential, passes_credential, printable, redact

HF, SK = "hf_" + "aB3" * 10, "sk-proj-" + "xY7_" * 8
CREDENTIALS = [
    HF,
    f"data={HF}.",
    SK,
    "sk-ant-" + "q8" * 12,
    "sk-ant-api03-" + "xY7_" * 20 + "-xY7_AA",
    "sk-or-v1-" + "a1" * 32,
    "sk-" + "xY7q" * 12,
    "sk-None-" + "xY7q" * 12,
    "sk-0a1a1a1a-a1a1-4a1a-a1a1-a1a1a1a1a1a1",
    "sk-lf-0a1a1a1a-a1a1-4a1a-a1a1-a1a1a1a1a1a1",
    "sk-Qz3RtY8mNb-" + "kLabcdefmXwPqRsTuVaB",
    "sk-qz3rty8mnb-" + "q8" * 10,
    "ghp_" + "a1" * 18,
    "github_pat_" + "a1" * 20,
    "AKIA" + "ABCDEFGH12345678",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghij",
    "https://user:hunter2@example.org/x",
    "https://hunter2@example.org/x",
]
NAMED = ["api_key=hunter2", "WANDB_API_KEY = hunter2", '"hf_token": "hunter2"', "password=hunter2"]
HARMLESS = [
    "set eos_token in tokenizer_config.json: without it no model can learn to stop",
    "stage.ppo.max_new_tokens=40 pad_token_id = 5 num_memory_tokens: 3",
    "/etc/passwd: not a kind of file that is read here",
    "sk-learn/data hf_hub api keys are secret things",
    "data.name=hf_ultrafeedback_binarized.jsonl runs/hf_smollm2_instruct_v2 ~/hf_rlhf_experiments/a.jsonl",
    "sk-learn-experiments-2024-run-3 sk-ant-colony-optimisation-2024 ASIA_reviews_of_restaurants.jsonl",
    "data.name=sk-news-headlines2024preferences sk-preferences20240131ofreaders sk-HelpfulAndHarmlessPairs",
    "runs/a@b mail me@example.org; https://example.org/a:b@c/d",
]
ESCAPES = {
    "ANSI": "\x1b[31mred\x1b[0m",
    "OSC 52": "\x1b]52;c;aGVsbG8=\x07",
    "C1": "\x9b31m",
    "backspaces": "safe\b\b\b\bevil",
    "carriage return": "safe\revil",
    "bidi": "a\u202eb\u2066c\u200fd",
    "separators": "a\u2028b\u2029c",
    "tags": "a\U000e0041",
    "half a pair": "a\ud800",
}


@pytest.mark.parametrize("text", CREDENTIALS)
def test_credentials_are_found_and_taken_out(text: str) -> None:
    assert holds_credential(text)
    shown = redact(f"before {text} after")
    assert "redacted" in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert not any(
        word in shown for word in ("hunter2", "aB3aB3", "xY7_xY7", "a1a1a1", "12345678", "abcdef", "q8q8")
    )


@pytest.mark.parametrize("text", NAMED)
def test_values_named_as_secrets_are_taken_out(text: str) -> None:
    assert "hunter2" not in redact(f"before {text}, after")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_credential(text)


def test_values_of_variables_named_as_secrets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("SHORT_TOKEN", "tiny")
    assert redact("k 0123456789abcdef0123!") == "k [redacted]!"
    assert redact("run tiny") == "run tiny"


@pytest.mark.parametrize(
    "unit", ["a", "a_", "hf_", "sk-", "sk-ant-", "sk-a1-", "://", "secret ", "a://", "a://b@", "=:'\""]
)
def test_redaction_of_a_megabyte_comes_to_an_end(unit: str) -> None:
    began = time.monotonic()
    redact(unit * (200_000 // len(unit)))
    assert time.monotonic() - began < 60  # quadratic, it would take hours


@pytest.mark.parametrize("name", ESCAPES)
def test_the_console_shows_what_would_act_on_a_terminal(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ESCAPES[name]
    log = tmp_path / "log"
    console = Console(log)
    console.line(text)
    console.plan(f"run {text}", text, [(text, text, text)])
    console.table([text, text], [[text, text]])
    console.say_finished(text, {"seconds": 1.0})
    with console.progress(text, "sft", 2) as on_step:
        on_step(1, {"loss": 1.0})
    with console.counting(text, 2) as advance:
        advance(1)
    shown = capsys.readouterr()
    for written in (shown.out, shown.err, log.read_text()):
        assert written.replace("\n", "").isprintable() or "\x1b" not in written
        assert not set(text) & set(written) - {c for c in text if c.isprintable()}
    assert "\u27e8U+" in shown.out


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text())
def test_printable_text_holds_nothing_that_acts(text: str) -> None:
    shown = printable(text)
    assert all(c in "\n\t" or ord(c) >= 32 for c in shown)
    shown.encode("utf-8")
    assert clean(shown, None) == shown


@pytest.mark.parametrize("key", ["data.name", "model.base", "stage.sft.init"])
def test_a_setting_that_holds_a_credential_is_refused(key: str, tmp_path: Path) -> None:
    for secret in (HF, SK, f"https://u:{HF}@example.org/x"):
        with pytest.raises(ConfigError, match=key) as caught:
            load_recipe("quickstart", [f"{key}={secret}"])
        assert "aB3aB3" not in str(caught.value)
        assert "xY7_" not in str(caught.value)
        assert "HF_TOKEN" in caught.value.hint


def test_what_is_there_is_a_path_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / HF).mkdir()
    for path in (HF, f"{tmp_path}/{HF}"):
        assert load_recipe("quickstart", [f"data.name={path}"]).config.data.name == path
    assert passes_credential(f"data.name={HF[:-1]}X")
    assert passes_credential(f"{HF[:-1]}X={HF}")


@pytest.mark.parametrize(
    "text",
    [
        "ASIAIOSFODNN7EXAMPLE",
        "https://example.org/data.jsonl?token=0123abcd",
        "s3://x/y?a=1&X-Amz-Signature=00ff00ff&b=2",
        "https://x.blob.core.windows.net/y?sv=1&sig=abc%2Bdef",
    ],
)
def test_what_a_signed_address_hands_over_is_a_credential(text: str) -> None:
    assert holds_credential(text)
    shown = redact(text)
    assert REDACTED in shown
    assert not holds_credential(shown)
    assert not any(secret in shown for secret in ("IOSFODNN", "0123abcd", "00ff00ff", "abc%2Bdef"))
    assert not holds_credential("https://example.org/x?page=2&tokens=8&step=3")


def test_a_bare_address_makes_no_link_in_markdown() -> None:
    """GitHub makes links of http://, https:// and www. wherever they stand (GFM, section 6.9)."""
    assert markdown(("see https://evil.example/x and WWW.evil.example",)) == (
        r"see https\://evil.example/x and WWW\.evil.example"
    )
    assert markdown(("a: b, v1.2.w.x",)) == "a: b, v1.2.w.x"
