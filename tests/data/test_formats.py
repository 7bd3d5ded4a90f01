"""Forms of rows: the examples of docs/data.md are read as the page says, and nothing is dropped silently."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from data_helpers import hh_row, write_jsonl

import prose
from preftune.config import DataConfig
from preftune.data import Dataset, Turn, load_dataset, read_preferences
from preftune.data.checks import BadRow
from preftune.data.formats import single
from preftune.data.formats.table import FORMATS
from preftune.errors import DataError

PAGE = Path(__file__).resolve().parents[2] / "docs/data.md"
EXAMPLES = re.findall(r"^\| ([\w ().-]+) \| `(\{.*\})` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


def load(path: Path, *rows: Mapping[str, Any], **settings: Any) -> Dataset:
    if rows:
        write_jsonl(path, rows)
    return load_dataset(DataConfig.model_validate({"name": str(path), **settings}))


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_the_page_has_an_example_of_every_form() -> None:
    assert {name.split(" (")[0] for name, _ in EXAMPLES} == {form.name for form in FORMATS}


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_the_examples_of_the_page_are_read(tmp_path: Path, name: str, example: str) -> None:
    row = json.loads(example)
    rows = [row, row | {"response": "bad", "helpfulness": 1}] if "helpfulness" in row else [row]
    data = load(tmp_path / "a.jsonl", *rows)
    form = next(form for form in FORMATS if form.name == name.split(" (")[0])
    assert data.kind == form.kind
    (pair,) = data.train
    assert pair.prompt == (() if data.kind == "text" else (Turn("human", " Q"),))
    replies = {"pairs": (" good", " bad"), "unpaired": (" good", ""), "prompts": ("", "")}
    assert (pair.chosen, pair.rejected) == replies.get(data.kind, ("Once upon a time", ""))


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        (
            {
                "prompt": "Q",
                "answers": [{"answer": a, "rank": r} for a, r in zip("abc", (2, 1, 2), strict=True)],
            },
            [("b", "a"), ("b", "c")],
        ),
        (
            {
                "instruction": "Q",
                "completions": [
                    {"response": "a", "fine-grained_score": 4.0, "overall_score": 1.0},
                    {"response": "b", "fine-grained_score": 2.0, "overall_score": 10.0},
                    {"response": "c", "fine-grained_score": 4.0, "overall_score": 4.0},
                ],
            },
            [("a", "b")],
        ),
        ({"prompt": "Q", "response_0": "a", "response_1": "b", "safer_response_id": 0}, [("a", "b")]),
        ({"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 3}, [("b", "a")]),
        ({"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, [("b", "a")]),
    ],
)
def test_the_better_reply_is_chosen(
    tmp_path: Path, row: dict[str, Any], pairs: list[tuple[str, str]]
) -> None:
    found = read_preferences(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert [(pair.chosen.strip(), pair.rejected.strip()) for pair in found] == pairs


def test_rated_replies_are_grouped_by_prompt_wherever_they_stand(tmp_path: Path) -> None:
    scores = [("P", "a", 3), ("Q", "c", 1), ("P", "b", 4), ("Q", "d", 1), ("P", "e", 0)]
    rows = [{"prompt": p, "response": r, "helpfulness": n} for p, r, n in scores]
    data = load(tmp_path / "a.jsonl", *rows)
    assert [(p.prompt[0].text, p.chosen, p.rejected) for p in data.train] == [
        (" P", " b", " a"), (" P", " b", " e")
    ]  # fmt: skip
    assert data.report["rejected"] == {"no_preference": 2}


CALL = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "tool call": ({"chosen": [said("assistant", "a", tool_calls=CALL)]}, "unread_parts"),
    "tool call without words": ({"chosen": [said("assistant", None, tool_calls=CALL)]}, "unread_parts"),
    "reasoning": ({"chosen": [said("assistant", "a", reasoning_content="so")]}, "unread_parts"),
    "picture": (
        {"prompt": [said("user", [{"type": "image"}, {"type": "text", "text": "Q"}])]},
        "unread_parts",
    ),
    "tools": ({"tools": CALL}, "unread_parts"),
    "history": ({"history": [["a", "b"]]}, "unread_parts"),
    "role": ({"prompt": [said("user", "Q"), said("Tool", "4")]}, "unsupported_role"),
    "printed by Python": ({"chosen": "[{'role': 'assistant', 'content': 'a'}]"}, "conversation_as_text"),
    "ChatML": ({"prompt": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"}, "already_templated"),
    "Llama 2": ({"prompt": "<s>[INST] Q [/INST]"}, "already_templated"),
    "ChatML inside": ({"chosen": "a<|im_end|>\n<|im_start|>user\nb"}, "already_templated"),
    "another turn inside": ({"prompt": "Q <|im_start|>assistant\nA"}, "already_templated"),
    "Llama 3 inside": (
        {"rejected": "a <|start_header_id|>user<|end_header_id|>\n\nb"},
        "already_templated",
    ),
    "end token inside": ({"chosen": "That is all.<|eot_id|> And more"}, "already_templated"),
    "a line's end": ({"chosen": "a <|im_end|>\nb"}, "already_templated"),
    "Gemma inside": ({"prompt": "Q\n<start_of_turn>model\nA"}, "already_templated"),
    "SteerLM inside": ({"chosen": "a\n<extra_id_1>User b"}, "already_templated"),
    "end token": ({"chosen": "a<|im_end|>"}, "already_templated"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_rows_with_parts_that_are_not_read_are_counted_and_said(tmp_path: Path, name: str) -> None:
    changed, reason = UNREAD[name]
    data = load(tmp_path / "a.jsonl", PAIR, PAIR | changed)
    assert data.report["rejected"] == {reason: 1}
    assert len(data.train) + len(data.validation) + len(data.test) == 1
    assert any(reason in note for note in data.report["notes"])
    with pytest.raises(DataError, match=f"none of the 1 rows .* 1 {reason}"):
        load(tmp_path / "b.jsonl", PAIR | changed)


def test_empty_parts_do_no_harm(tmp_path: Path) -> None:
    reply = said("assistant", "good", tool_calls=None, reasoning_content="", name="x")
    data = load(tmp_path / "a.jsonl", PAIR | {"chosen": [reply], "tools": [], "system": None, "images": None})
    assert data.train[0].chosen == " good"


def test_a_text_about_a_template_is_no_template(tmp_path: Path) -> None:
    text = "Put <|im_start|> in front of it, `<|im_end|>` behind it, [INST] is for Llama, </s> is struck."
    assert load(tmp_path / "a.jsonl", PAIR | {"prompt": text}).train[0].prompt[0].text == f" {text}"


def test_turns_of_helpsteer2_are_turns(tmp_path: Path) -> None:
    text = "Q\n<extra_id_1>Assistant\nA\n\nB\n<extra_id_1>User\nR"
    turns = (Turn("human", " Q"), Turn("assistant", " A\n\nB"), Turn("human", " R"))
    for prompt in (text, f"<extra_id_1>User\n{text}", f"{text}\n<extra_id_1>Assistant\n"):
        assert load(tmp_path / "a.jsonl", PAIR | {"prompt": prompt}).train[0].prompt == turns
    rows = [{"prompt": text, "response": reply, "helpfulness": n} for n, reply in enumerate(("bad", "good"))]
    assert load(tmp_path / "a.jsonl", *rows).train[0].prompt == turns
    for prompt, reason in (
        ("<extra_id_0>System\nS\n<extra_id_1>User\nQ", "already_templated"),
        (text.removesuffix("\n<extra_id_1>User\nR"), "prompt_ends_on_assistant"),
    ):
        assert load(tmp_path / "a.jsonl", PAIR, PAIR | {"prompt": prompt}).report["rejected"] == {reason: 1}


def test_texts_that_a_stage_has_collected_stay_as_they_were_sampled(tmp_path: Path) -> None:
    """In plain form they go on with the prompt's text: ", well" is not " , well"."""
    sampled = {"chosen": ", well\n", "rejected": "s  are"}
    row = PAIR | sampled | {"policy_sha256": "0" * 64}
    (pair,) = load(tmp_path / "a.jsonl", row, form="plain").train
    assert (pair.chosen, pair.rejected) == tuple(sampled.values())
    (pair,) = load(tmp_path / "b.jsonl", PAIR | sampled, form="plain").train
    assert (pair.chosen, pair.rejected) == (" , well", " s  are")
    said_by = {key: [said("assistant", text)] for key, text in sampled.items()}
    assert load(tmp_path / "c.jsonl", row | said_by).train[0].chosen == " , well"


def test_an_answer_may_be_a_number(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "answer": 4}, {"prompt": "1/2?", "answer": 0.5}]
    data = load(tmp_path / "a.jsonl", *rows, held_out=1e-9)
    found = {row.chosen: row.columns["answer"] for row in (*data.train, *data.validation, *data.test)}
    assert found == {" 4": 4, " 0.5": 0.5}
    digits = int("7" * 375)  # more than a float holds
    (row,) = single.reply({"prompt": "200!?", "answer": digits})
    assert row.chosen == " " + "7" * 375
    with pytest.raises(BadRow, match='"answer" is a number of too many digits'):
        single.reply({"prompt": "2000!?", "answer": 10**5000})
    with pytest.raises(DataError, match='"answer" is true or false, not text'):
        load(tmp_path / "a.jsonl", {"prompt": "Q", "answer": True})


@pytest.mark.parametrize(
    ("columns", "form", "chosen"),
    [
        ({"text": "story"}, "text", "Once"),
        ({"completion": "out"}, "replies", " fine"),
        ({"prompt": "ask", "completion": "out"}, "replies", " fine"),
        ({"prompt": "ask", "chosen": "story", "rejected": "out"}, "preference pairs", " Once"),
        ({"prompt": "ask"}, "preference pairs", " good"),
    ],
)
def test_what_a_person_names_tells_the_form(
    tmp_path: Path, columns: dict[str, str], form: str, chosen: str
) -> None:
    row = PAIR | {"story": "Once", "out": "fine", "ask": "R"}
    data = load(tmp_path / "a.jsonl", row, columns=columns)
    assert data.train[0].chosen == chosen
    assert form == "preference pairs" or any(f"rows read as {form}" in note for note in data.report["notes"])


def test_a_prompt_that_is_named_is_no_text(tmp_path: Path) -> None:
    row = {"ask": "Q", "text": "Once"}
    assert load(tmp_path / "a.jsonl", row, columns={"prompt": "ask"}).kind == "prompts"
    assert load(tmp_path / "a.jsonl", row).kind == "text"


def test_a_system_column_is_the_system_message_and_is_said(tmp_path: Path) -> None:
    data = load(tmp_path / "a.jsonl", PAIR | {"system": "Be brief."})
    assert data.train[0].prompt == (Turn("system", " Be brief."), Turn("human", " Q"))
    (note,) = (note for note in data.report["notes"] if note.startswith("rows with a system column"))
    prose.compare("data/formats: a system column", note)
    own = [said("system", "Be long."), said("user", "Q")]
    data = load(tmp_path / "b.jsonl", PAIR | {"system": "Be brief.", "prompt": own})
    assert data.train[0].prompt[0] == Turn("system", " Be long.")


def test_conversations_as_json_text_are_read_and_said(tmp_path: Path) -> None:
    row = {
        key: json.dumps([said("assistant", text)]) for key, text in (("chosen", "good"), ("rejected", "bad"))
    }
    data = load(tmp_path / "a.jsonl", {"prompt": json.dumps([said("user", "Q")])} | row)
    assert (data.train[0].chosen, data.train[0].prompt) == (" good", (Turn("human", " Q"),))
    assert any("JSON text" in note for note in data.report["notes"])
    data = load(tmp_path / "b.jsonl", PAIR | {"chosen": '[{"name": "x"}]'})
    assert data.train[0].chosen == ' [{"name": "x"}]'


def test_a_prompt_inside_of_the_conversation_is_not_doubled(tmp_path: Path) -> None:
    start = [said("system", "S"), said("user", "Q")]
    row = {"chosen": [*start, said("assistant", "good")], "rejected": [*start, said("assistant", "bad")]}
    expected = (Turn("system", " S"), Turn("human", " Q"))
    assert load(tmp_path / "a.jsonl", row | {"prompt": "Q"}).train[0].prompt == expected
    short = {key: value[1:] for key, value in row.items()}
    assert load(tmp_path / "b.jsonl", short | {"prompt": start}).train[0].prompt == expected


def test_columns_are_named(tmp_path: Path) -> None:
    row = {"ask": "Q", "replies": {"up": "good", "down": "bad"}, "chosen": "something else"}
    columns = {"prompt": "ask", "chosen": "replies.up", "rejected": "replies.down"}
    (pair,) = load(tmp_path / "a.jsonl", row, columns=columns).train
    assert (pair.prompt[0].text, pair.chosen, pair.rejected) == (" Q", " good", " bad")
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", columns=columns).train[0] == pair
    with pytest.raises(DataError, match=r"no column 'question'.*data.columns names \(it has: 'ask, replies"):
        load(tmp_path / "a.jsonl", columns={"prompt": "question"})


def test_unknown_columns_are_listed_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1: no \"chosen\" .*'ask, good, bad'") as caught:
        load(tmp_path / "a.jsonl", {"ask": "Q", "good": "a", "bad": "b"})
    assert "data.columns.chosen=NAME" in caught.value.hint


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    data = load(tmp_path / "a.jsonl", PAIR | {"score": 1, "meta": {}})
    assert data.report["notes"] == ["columns not read: 'meta', 'score'"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "1+1?", "answer": "2", "level": 3}],
        [{"prompt": "1+1?", "answer": "2", "level": 3, "chosen": "2", "rejected": "3"}],
        [{"prompt": "1+1?", "response": f"{i}", "helpfulness": i, "answer": "2", "level": 3} for i in (1, 2)],
    ],
)
def test_reward_functions_get_the_other_columns_of_a_row(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (row,) = load(tmp_path / "train.jsonl", *rows).train
    assert {name: row.columns[name] for name in ("answer", "level")} == {"answer": "2", "level": 3}
    assert "prompt" not in row.columns


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="rows of several kinds: 2 preference pairs, 1 prompts without replies"
    ):
        load(tmp_path / "a.jsonl", PAIR, PAIR, {"prompt": "Q"})
    with pytest.raises(DataError, match="its rows are prompts without replies, and preference pairs"):
        read_preferences(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Q"}]))


def test_undesirable_replies_are_kept_apart_and_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(6)]
    data = load(tmp_path / "a.jsonl", *rows)
    kept = [*data.train, *data.validation, *data.test]
    assert {pair.chosen for pair in kept} == {" a0", " a2", " a4"}
    assert [(row.chosen, row.rejected) for row in data.undesirable] == [("", f" a{i}") for i in (1, 3, 5)]
    assert any("3 undesirable" in note for note in data.report["notes"])


@pytest.mark.parametrize("others", [[], [{"prompt": "Q", "completion": "a", "label": True, "split": "test"}]])
def test_undesirable_replies_alone_are_no_data(tmp_path: Path, others: list[dict[str, Any]]) -> None:
    bad = {"prompt": "Q", "completion": "b", "label": False}
    with pytest.raises(DataError, match="no desirable reply to train on, only 1 undesirable"):
        load(tmp_path / "a.jsonl", bad, *others)


def test_texts_are_kept_verbatim_and_split_by_what_they_say(tmp_path: Path) -> None:
    texts = [f"  Once, {i} \n" for i in range(200)]
    data = load(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    parts = [{pair.chosen for pair in part} for part in (data.train, data.validation, data.test)]
    assert set.union(*parts) == set(texts)
    assert all(parts)
    assert sum(map(len, parts)) == 200


MESSAGES = [
    {
        "prompt": [said("user", f"Q{i}")],
        "chosen": [said("assistant", "good")],
        "rejected": [said("assistant", "bad")],
    }
    for i in range(12)
]


def _write(kind: str, path: Path) -> Path:
    """The same 12 rows as a file or directory of each kind."""
    import datasets

    rows = datasets.Dataset.from_list(MESSAGES)
    if kind == "array":
        (path / "a.json").write_text(json.dumps(MESSAGES, indent=1))
    elif kind == "lines in .json":
        write_jsonl(path / "a.json", MESSAGES)
    elif kind == "row groups":
        rows.to_parquet(path / "a.parquet", batch_size=5)
        assert parquet.ParquetFile(path / "a.parquet").num_row_groups == 3
    elif kind == "feather":
        feather.write_feather(pa.Table.from_pylist(MESSAGES), path / "a.feather")
    elif kind == "save_to_disk":
        rows.save_to_disk(path)
        (path / "cache-1.arrow").write_bytes(b"another")
    elif kind in (between := {"csv": ",", "tsv": "\t", "semicolons.csv": ";"}):
        with open(path / f"a.{kind}", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=between[kind])
            writer.writerow(["prompt", "chosen", "rejected"])
            writer.writerows([f"Q{i}", "good", "bad"] for i in range(12))
    return path


@pytest.mark.parametrize(
    "kind",
    ["array", "lines in .json", "row groups", "feather", "save_to_disk", "csv", "tsv", "semicolons.csv"],
)
@pytest.mark.xdist_group("datasets")  # one worker imports it
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    pairs = read_preferences(_write(kind, tmp_path))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ((Turn("human", f" Q{i}"),), " good", " bad") for i in range(12)
    ]


@pytest.mark.xdist_group("datasets")  # one worker imports it
def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    import datasets

    rows = {
        name: datasets.Dataset.from_list([hh_row(name)])
        for name in ("train_prefs", "test_prefs", "train_sft")
    }
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "data")
    data = load(tmp_path / "data", held_out=1e-9)
    assert [pair.prompt[0].text for pair in (*data.train, *data.test)] == [" train_prefs", " test_prefs"]
    assert any("train_sft" in note and "not read" in note for note in data.report["notes"])


def test_csv_says_which_replies_were_cut(tmp_path: Path) -> None:
    columns = "prompt,chosen,rejected,ended_chosen,ended_rejected"
    (tmp_path / "a.csv").write_text(f"{columns}\nQ,a,b,True,False\nR,a,b,0,\n")
    assert [pair.ended for pair in read_preferences(tmp_path / "a.csv")] == [(True, False), (False, True)]


def test_csv_keeps_the_words_that_look_like_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\n"say ""NA"",\nplease",NA,null\n')
    (pair,) = read_preferences(tmp_path / "a.csv")
    assert (pair.prompt[0].text, pair.chosen, pair.rejected) == (' say "NA",\nplease', " NA", " null")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt, chosen, rejected\nQ, "a, b", c\n'),
        ("a.csv", '\n \nprompt,chosen ,"rejected "\nQ,"a, b",c\n'),
        ("a.tsv", "prompt\t chosen\trejected\nQ\ta, b\tc\n"),
        ("a.csv", "prompt; chosen; rejected\nQ; a, b; c\n"),
    ],
)
def test_a_header_may_have_blanks(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (pair,) = read_preferences(tmp_path / name)
    assert (pair.prompt[0].text, pair.chosen, pair.rejected) == (" Q", " a, b", " c")


def test_blanks_of_a_single_column_are_kept(tmp_path: Path) -> None:
    """Its header has no "a, b" to say that a blank follows a comma."""
    (tmp_path / "a.csv").write_text("text\n  Once upon a time.\n")
    data = load(tmp_path / "a.csv", held_out=1e-9)
    assert [row.chosen for row in data.train] == ["  Once upon a time."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "\n\nprompt,chosen,rejected\nQ,a,b\nQ,a\n", r"a.csv:5: 2 values for the 3 columns"),
        ("a.json", json.dumps(PAIR, indent=1), "one JSON object over several lines"),
        ("a.json", json.dumps({"data": [PAIR] * 3}, indent=1), "one JSON object over several lines"),
        ("a.json", json.dumps({"data": [PAIR] * 3}, indent=1)[:-9], "one JSON object over several lines"),
        ("a.json", f"{json.dumps(PAIR)}\n{{", "a.json:2: not JSON"),
        ("a.json", f'{{"prompt": \n{json.dumps(PAIR)}', "a.json: one JSON object|a.json:1: not JSON"),
        ("a.csv", "prompt,chosen,rejected\nQ,a,b\nQ,a\n", r"a.csv:3: 2 values for the 3 columns"),
        ("a.csv", "chosen,chosen\na,b\n", "a column name appears twice"),
        ("a.csv", 'prompt,chosen,rejected\nQ,"a,b\n', r"a.csv: not CSV"),
        ("a.csv", b"prompt,chosen,rejected\nQ,\xff,b\n", r"a.csv:2: byte 3 .* not UTF-8"),
        ("a.json", '[{"chosen": "a"', "row 1: not JSON"),
        ("a.json", "[", "row 1: not JSON"),
        ("a.json", json.dumps([PAIR])[:-1], "row 2: the JSON array ends early"),
        ("a.json", json.dumps([PAIR]) + "x", "more text after the JSON array"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.json", "[1]", "row 1: the row is a number, not an object"),
        ("a.json", "[]", "the file is empty"),
        ("a.arrow", "ARROW1 and so on", "cannot be read as Arrow data"),
        ("a.arrow", "", "cannot be read as Arrow data"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        read_preferences(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_an_arrow_file_that_repeats_one_value_is_refused(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * (1 << 20)]))
    table = pa.table({"chosen": text, "rejected": text})
    feather.write_feather(table, tmp_path / "a.feather", compression="zstd")
    with pytest.raises(DataError, match="unpack to more than"):
        read_preferences(tmp_path / "a.feather")
