"""`inspect RECIPE` shows the columns that a step gets; `inspect RUN` numbers that the models give."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import preftune
import prose
from preftune.cli import main
from preftune.config.algorithms.collect import CollectConfig
from preftune.data import Dialogue, Turn
from preftune.data.pieces import speakers
from preftune.inspection.command import _session
from preftune.inspection.paint import paint_replies, visible_text
from preftune.inspection.replies import token_rows
from preftune.inspection.rows import View, _sampling, row_to_show, views
from preftune.report.load import load_run
from preftune.rundir import RunDir, read_json, write_jsonl
from preftune.runs.reopen import reopen


def dialogue(*texts: str) -> Dialogue:
    roles = ("human", "assistant")
    return Dialogue(Turn(roles[i % 2], f" {text}") for i, text in enumerate(texts))  # type: ignore[arg-type]


def test_each_token_of_a_prompt_has_its_speaker() -> None:
    texts = [
        "\n\n",
        "Human",
        ":",
        " Hi",
        " there",
        "\n\nAssistant",
        ":",
        " Hi",
        "\n\nHuman:",
        " So",
        "\n\nAssistant:",
    ]
    parts = speakers(texts, dialogue("Hi there", "Hi", "So"))
    t, h = "template", "human"
    assert parts == [t, t, t, h, h, t, t, "assistant", t, h, t]


def test_a_turn_that_was_cut_is_known_by_its_rest() -> None:
    texts = ["\n\nHuman:", " jumps", " over", " it", "\n\nAssistant:"]
    parts = speakers(texts, dialogue("The fox", "Yes", "The quick fox jumps over it"))
    assert parts == ["template", "human", "human", "human", "template"]


@pytest.fixture(scope="module")
def seen() -> dict[str, list[View]]:
    """Row 7 as every stage of `tiny` sees it; nothing is trained."""
    session = _session("tiny", False, ["stage.kto.algorithm=kto", "data.pairs=60"])
    found: dict[str, list[View]] = {}
    for view in views(session, list(session.config.stage), row_to_show(session, 7), only=False):
        found.setdefault(view.stage, []).append(view)
    return found


def test_the_loss_is_taken_at_the_reply_and_its_end(seen: dict[str, list[View]]) -> None:
    (view,) = seen["sft"]
    assert [t.part for t in view.tokens if t.loss][-1] == "end"
    assert {t.part for t in view.tokens if t.loss} == {"reply", "end"}
    assert not any(t.loss for t in view.tokens if t.part in ("human", "template", "padding"))
    text = "".join(t.text for t in view.tokens)
    assert text.startswith("\n\nHuman: ")
    assert text.endswith("<|endoftext|>")


def test_a_score_is_read_at_the_last_token_alone(seen: dict[str, list[View]]) -> None:
    assert len(seen["rm"]) == 2
    for view in seen["rm"]:
        assert [t.part for t in view.tokens if t.score] == ["end"]
        assert not any(t.loss for t in view.tokens)
    chosen, rejected = ("".join(t.text for t in view.tokens if t.part == "human") for view in seen["rm"])
    assert chosen == rejected


def test_a_mean_score_is_read_at_the_whole_reply() -> None:
    session = _session("tiny", False, ["stage.rm.pooling=mean", "data.pairs=60"])
    for view in views(session, ["rm"], row_to_show(session, 7), only=True):
        read = {t.part for t in view.tokens if t.score}
        assert read == {"reply", "end"}
        assert not any(t.part in read and not t.score for t in view.tokens)


def test_the_rows_of_a_pair_are_told_apart(seen: dict[str, list[View]]) -> None:
    assert [view.title.rpartition(", ")[2] for view in seen["dpo"]] == ["chosen", "rejected"]
    *labels, mismatched = [view.title.rpartition(", ")[2] for view in seen["kto"]]
    assert labels == ["desirable", "undesirable"]
    assert "another prompt" in mismatched
    titles = [view.title for views in seen.values() for view in views]
    said = [re.sub(r"step \d+ of \d+", "step N of M", title) for title in titles]
    prose.compare("inspection/tokens_seen: what a stage sees", *said)
    assert all(any(t.loss for t in view.tokens) for view in seen["kto"])


def test_prompts_are_padded_on_the_left(seen: dict[str, list[View]]) -> None:
    for name in ("ppo", "grpo"):
        (view,) = seen[name]
        parts = [t.part for t in view.tokens]
        assert parts == sorted(parts, key=lambda part: part != "padding")
        assert "until one of '<|endoftext|>'" in view.notes[0]


def test_each_kind_of_judge_is_named() -> None:
    encoder, said = SimpleNamespace(ends=[0], text_of=lambda ids: "<|endoftext|>"), list[str]()
    for judge in ("rm", "./models/rm", "my_module:f", "llm:judge-1b"):
        llm = {"url": "http://127.0.0.1:1/v1"} if judge.startswith("llm:") else {}
        config = CollectConfig.model_validate({"judge": judge, "llm": llm})
        said.append(_sampling(config, encoder)[1])  # type: ignore[arg-type]
        assert (judge in said[-1]) is not judge.startswith("llm:")
    prose.compare("inspection/tokens_seen: kinds of judges", *said)


def test_padding_fills_the_batch(seen: dict[str, list[View]]) -> None:
    widths = {name: {len(view.tokens) for view in found} for name, found in seen.items()}
    assert len(widths["rm"]) <= 2
    for found in seen.values():
        for view in found:
            parts = [t.part for t in view.tokens]
            assert "padding" not in parts[: len(parts) - parts.count("padding")] or parts[0] == "padding"


def test_a_row_that_is_not_there_is_refused() -> None:
    assert main(["inspect", "tiny", "300", "data.pairs=60"]) == 64
    assert main(["inspect", "tiny", "--stage", "pppo"]) == 64


def test_a_row_that_a_template_refuses_is_not_the_one_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SimpleNamespace(prompt=prompt) for prompt in ("refused", "taken")]
    encoder = SimpleNamespace(accepts=lambda prompt: prompt == "taken")
    monkeypatch.setattr("preftune.inspection.rows._encoder", lambda *_: encoder)
    config = SimpleNamespace(data=SimpleNamespace(form="chat"), stage={"sft": None})
    session: Any = SimpleNamespace(config=config, training_rows=lambda: rows)
    assert row_to_show(session, None) is rows[1]


def test_a_token_takes_one_line_and_no_escape() -> None:
    assert visible_text("\n\n\tx\x1b") == "↵↵⇥x⟨U+001B⟩"
    assert len(visible_text("x" * 10_000)) < 300


REPLY = {
    "stage": "ppo",
    "reference": "sft",
    "row": "7",
    "texts": [" The", " [bold]fox", "\x1b[31m"],
    "log_ratio": [0.5, -1.0, 0.0],
    "kl": [0.1, 0.4, 0.0],
    "advantage": [],
    "score": [0.0, 2.0, 1.0],
    "reply_score": 1.0,
    "ended": True,
}


def painted(**how: Any) -> str:
    out = io.StringIO()
    paint_replies(Console(file=out, width=120, soft_wrap=True, highlight=False, **how), [REPLY], "a note")
    return out.getvalue()


def test_in_colour_a_reply_is_painted_once_for_each_measure() -> None:
    text = painted(force_terminal=True, color_system="256", no_color=False)
    assert [text.count(word) for word in ("log-ratio", "KL ", "change of the score", "advantage")] == [
        1,
        2,
        1,
        0,
    ]
    down = "\x1b[4;30;48;5;209m"  # underlined, black on the darkest orange: the largest fall of each measure
    assert f"{down} [bold]fox" in text  # of the log-ratio
    assert "\x1b[31m" not in text
    assert "⟨U+001B⟩[31m" in text


@pytest.mark.parametrize("how", [{}, {"force_terminal": True, "color_system": "256", "no_color": True}])
def test_piped_or_without_colour_it_is_a_line_a_token(how: dict[str, Any]) -> None:
    lines = [line.split() for line in painted(**how).splitlines() if "fox" in line]
    assert lines == [["-1.0000", "+0.4000", "+2.0000", "[bold]fox"]]
    assert "score +1.00, log(policy / sft) -0.50," in painted(**how)
    assert "KL 0.50 nats, 3 tokens, ends" in painted(**how)


def test_numbers_by_token_are_those_of_the_models(tiny_run: RunDir) -> None:
    """Log-ratio and KL from the logits of two saved models by transformers, the score from the judge."""
    session = reopen(tiny_run.path, write=False)
    row = token_rows(session, "grpo", row_to_show(session, None))[0]
    directory = tiny_run.models / "policy_grpo"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = row["texts"]
    ids = torch.tensor([tokenizer(row["prompt"] + "".join(texts)).input_ids])
    logs = []
    for name in ("policy_grpo", "policy_sft"):
        model = AutoModelForCausalLM.from_pretrained(tiny_run.models / name).eval()
        with torch.no_grad():
            logs.append(model(ids).logits[0, :-1].log_softmax(-1)[-len(texts) :])
    ours, theirs = logs
    targets = ids[0, -len(texts) :].unsqueeze(1)
    ratio = (ours - theirs).gather(1, targets).squeeze(1)
    torch.testing.assert_close(torch.tensor(row["log_ratio"]), ratio, atol=2e-5, rtol=1e-4)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    torch.testing.assert_close(torch.tensor(row["kl"]), kl, atol=2e-5, rtol=1e-4)
    judge = preftune.load_reward_model(tiny_run.models / "reward_model")
    said = "".join(texts).removesuffix("<|endoftext|>")
    score = judge.score([row["prompt"]], [said], ended=row["ended"]).item()
    assert row["score"][-1] == pytest.approx(score, abs=1e-4)
    assert row["reply_score"] == pytest.approx(score if row["ended"] else -1.0, abs=1e-4)
    assert len(set(row["advantage"])) == 1  # the same for every token of a reply


def test_ppo_has_an_advantage_for_each_token_and_dpo_none(tiny_run: RunDir) -> None:
    session = reopen(tiny_run.path, write=False)
    ppo, dpo = (token_rows(session, name, row_to_show(session, None))[0] for name in ("ppo", "dpo"))
    assert len(ppo["advantage"]) == len(ppo["texts"])
    assert len(set(ppo["advantage"])) > 1 or len(ppo["texts"]) == 1
    assert dpo["advantage"] == []


def test_replies_go_into_the_report_until_their_policy_changes(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = RunDir(shutil.copytree(tiny_run.path, tmp_path / "run"))
    before = run.report_page.read_text()
    words = ["inspect", str(run.path), "--stage", "dpo"]
    assert main(words) == 0
    assert run.report_page.read_text() == before  # nothing is written unasked
    assert main([*words, "--report", "--json", str(tmp_path / "seen.json")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    rows = load_run(run).tokens
    assert [row.stage for row in rows] == ["dpo", "dpo"]
    assert [list(row.texts) for row in rows] == [
        r["texts"] for r in read_json(tmp_path / "seen.json")["replies"]
    ]
    page = run.report_page.read_text()
    assert "Replies token by token" in page
    assert "Replies token by token" in (run.path / "analysis" / "tokens.md").read_text()
    file = run.analysis_details / "tokens.jsonl"
    stale = [json.loads(line) | {"key": "0" * 64} for line in file.read_text().splitlines()]
    write_jsonl(file, stale)
    assert load_run(run).tokens == ()
