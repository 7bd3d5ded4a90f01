"""Generated input for all that a person hands in as a file: data files of every kind, and recipes.

`make fuzz` runs 10,000 of them and writes what happened; `test_fuzz.py` runs some hundred.
"""

import argparse
import contextlib
import csv
import gzip
import io
import json
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as parquet
from data_helpers import CHAT, hh_row, make_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from preftune.config import DataConfig, load_recipe
from preftune.data import Encoder, load_dataset
from preftune.data.formats.table import FORMATS
from preftune.errors import PreftuneError

LINES = 8  # of an error on the terminal
SPECIAL = ["<|im_start|>", "<|im_end|>"]
WORDS = [
    *("chosen", "rejected", "prompt", "role", "content", "user", "assistant", "system", "tool", ""),
    *("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman:", "\n\nAssistant:", " yes", "no ", "\u2028", "\ufeff", "\0"),
    *("\U0001f600", "\u202e", *SPECIAL, "a" * 300, "\x1b[31m", "{{ 1 }}", "../x", "NaN"),
]
PIECES = [
    *(
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\n",
        b"\0",
        b"\xff",
        b"\\ud800",
        b"\\u0000",
        b"NaN",
        b"-Infinity",
        b"1e999",
    ),
    *(b'{"chosen":', b'"', b"}", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xe2\x80\xa8", b"\x1f\x8b\x08"),
    *(b"PAR1", b'"chosen": "a", "chosen": "b"', b"null", b"true", b"\xed\xa0\x80", b"  \t "),
]
TOML = [
    *(
        'name = "x"\n',
        "[model]\n",
        "[stage.sft]\n",
        'algorithm = "sft"\n',
        "seed = 1\n",
        "seed = -1\n",
        "nan = nan\n",
    ),
    *(
        'base = "scratch"\n',
        "[data]\n",
        'name = "world"\n',
        "[[stage]]\n",
        "stage = 3\n",
        "a.b.c = 1\n",
        "[" * 2000,
    ),
    *(
        "rows = 1e400\n",
        "rows = 99999999999999999999\n",
        "x = 1979-05-27\n",
        "x = [1, {}]\n",
        '"" = 1\n',
        "\0",
        '"""',
    ),
    *(
        'init = "sft"\n',
        "[stage.a]\n",
        'algorithm = "dpo"\n',
        "[stage.'../x']\n",
        "[model.scratch]\n",
        "\u202e",
        "=\n",
    ),
]

words = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=30), st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)
messages = st.lists(st.fixed_dictionaries({"role": words | values, "content": words | values}), max_size=3)
texts = st.one_of(words, words.map(lambda text: f"\n\nHuman: Hi\n\nAssistant: {text}"), messages, values)
# What cells of other forms hold: numbers, rated replies, messages of every shape, and those as JSON text.
numbers = st.one_of(st.integers(-3, 4), st.floats(), st.sampled_from(["1", "0", "true", "x", "model_a"]))
SOME = ("role", "content", "from", "value", "answer", "response", "rank", "score", "text", "type", "tools")
MORE = ("system", "split", "tools", "label", "input", "history")
ROLES = ("user", "assistant", "gpt", "Human", "system", "tool")
TEXT_FORMS = ("transcript", "chat", "plain")


@st.composite
def formed(draw: st.DrawFn) -> dict[str, Any]:
    """A row with the keys of one form and maybe others, and cells that often fit."""
    form = draw(st.sampled_from(FORMATS))
    keys = [draw(st.sampled_from(need.split("|"))) for need in form.needs]
    keys += draw(st.lists(st.sampled_from(MORE), max_size=2))
    row = {}
    for key in keys:
        kind = draw(st.sampled_from(["text", "text", "number", "any", "messages", "objects", "JSON"]))
        if kind == "messages" or kind == "JSON":
            role, content = draw(st.sampled_from([("role", "content"), ("from", "value")]))
            message = st.fixed_dictionaries({role: st.sampled_from(ROLES), content: words})
            made = draw(st.lists(message, max_size=3))
            row[key] = made if kind == "messages" else json.dumps(made)
        elif kind == "objects":
            objects = st.dictionaries(st.sampled_from(SOME), st.one_of(words, numbers, values), max_size=5)
            row[key] = draw(st.lists(objects, max_size=3))
        else:
            row[key] = draw({"text": words, "number": numbers, "any": values}[kind])
    return row


rows = st.one_of(
    st.builds(hh_row, words, words, words),
    formed(),
    st.fixed_dictionaries({"chosen": texts, "rejected": texts}, optional={"prompt": texts, "other": values}),
    values,
)
good = st.builds(hh_row, words, words.map("a{}".format), words.map("b{}".format))


def _dumped(row: Any, ascii_only: bool) -> bytes:
    return json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


lines = st.lists(st.builds(_dumped, good | rows, st.booleans()), max_size=6).map(b"\n".join)
good_lines = st.lists(st.builds(_dumped, good, st.booleans()), min_size=1, max_size=6).map(b"\n".join)


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Content with up to three pieces put in, cut out or flipped."""
    data = draw(contents)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 3]))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["insert", "cut", "drop", "flip"]))
        if kind == "insert":
            data = data[:at] + draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8))) + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return data


def _table(made: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pylist(made), buffer)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):  # no table of these rows
        return b"PAR1"
    return buffer.getvalue()


def _arrow(made: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    try:
        table = pa.Table.from_pylist(made)
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return b"ARROW1"
    return buffer.getvalue()


def _csv(made: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in made for key in row)))
    writer.writeheader()
    writer.writerows(made)
    return buffer.getvalue().encode("utf-8", "surrogatepass")


def _array(made: list[dict[str, Any]]) -> bytes:
    return json.dumps(made).encode()


some = st.lists(good, max_size=4) | st.lists(good | formed(), max_size=4)
plain = st.one_of(st.binary(max_size=200), lines, good_lines, good_lines)
records = st.dictionaries(st.sampled_from(WORDS[:3]), texts, max_size=3)
tables = st.one_of(st.lists(good, max_size=4), st.lists(good | records, max_size=4)).map(_table)
TINY = (resources.files("preftune") / "recipes/tiny.toml").read_text(encoding="utf-8")
additions = st.lists(st.sampled_from(TOML) | st.text(max_size=20), max_size=12).map("".join)
recipes = st.one_of(additions, additions.map(lambda text: TINY + text), st.just(TINY))


@dataclass(frozen=True)
class Case:
    """One file as it is handed in."""

    suffix: Literal[".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".arrow", ".toml"]
    content: bytes
    on_bad_row: Literal["error", "skip"] = "error"
    form: Literal["transcript", "chat", "plain"] = "transcript"


_how = {"on_bad_row": st.sampled_from(["error", "skip"]), "form": st.sampled_from(TEXT_FORMS)}
cases = st.one_of(
    st.builds(Case, st.just(".jsonl"), damaged(plain), **_how),
    st.builds(Case, st.just(".jsonl"), damaged(good_lines), **_how),
    st.builds(
        Case, st.just(".jsonl.gz"), damaged(plain.map(lambda data: gzip.compress(data, 1, mtime=0))), **_how
    ),
    st.builds(Case, st.just(".parquet"), damaged(tables | some.map(_table)), **_how),
    st.builds(Case, st.just(".json"), damaged(some.map(_array)), **_how),
    st.builds(Case, st.just(".csv"), damaged(some.map(_csv)), **_how),
    st.builds(Case, st.just(".arrow"), damaged(some.map(_arrow)), **_how),
    st.builds(
        Case, st.just(".toml"), damaged(recipes.map(lambda text: text.encode("utf-8", "surrogatepass")))
    ),
)


@dataclass
class Trial:
    """Hands cases in as a run would: read, split, encode; or read a recipe. Counts what becomes of them."""

    folder: Path
    seconds: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    stalls: int = 0

    def __post_init__(self) -> None:
        tokenizer = make_tokenizer(SPECIAL, eos_token=SPECIAL[1])
        tokenizer.chat_template = CHAT
        self.encoders = {form: Encoder(tokenizer, form, 40, 40, 80) for form in TEXT_FORMS}

    def hand_in(self, case: Case) -> None:
        """Any other end than success or a short error that names the file is a fault."""
        path = self.folder / f"case{case.suffix}"
        path.write_bytes(case.content)
        began = time.perf_counter()
        try:
            outcome = self._use(case, path)
        except PreftuneError as error:
            outcome = f"exit {error.code}"
            shown = f"error: {error}"
            if error.code not in (64, 65, 66, 78) or shown.count("\n") >= LINES or len(shown) > 2000:
                self.faults.append(f"{case}\n{shown}")
            if case.suffix != ".toml" and str(path) not in shown:
                self.faults.append(f"{case}\nnames no file: {shown}")
        except Exception:
            outcome = "traceback"
            self.faults.append(f"{case}\n{traceback.format_exc()}")
        seconds = time.perf_counter() - began
        if seconds > 1:  # the input, or a machine that was busy? The input takes as long again
            self.stalls += 1
            seconds = min(seconds, self._again(case, path))
        self.seconds.append(seconds)
        self.outcomes[f"{case.suffix}: {outcome}"] += 1
        if {file.name for file in self.folder.iterdir()} != {path.name}:
            self.faults.append(f"{case}\nsomething was written")
        path.unlink()

    def _again(self, case: Case, path: Path) -> float:
        began = time.perf_counter()
        with contextlib.suppress(Exception):
            self._use(case, path)
        return time.perf_counter() - began

    def _use(self, case: Case, path: Path) -> str:
        if case.suffix == ".toml":
            load_recipe(str(path))
            return "read"
        data = load_dataset(DataConfig(name=str(path), on_bad_row=case.on_bad_row))
        encoder = self.encoders[case.form]
        for pairs in (data.train, data.validation, data.test):
            for pair in encoder.usable(pairs)[0]:
                assert all(ids for ids in encoder.pair(pair)), "a sequence of no tokens"
        json.dumps(data.report)
        return "read"


def try_many(count: int, trial: Trial) -> None:
    """Hand in `count` cases; the same ones every time."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def hand_in(case: Case) -> None:
        trial.hand_in(case)

    hand_in()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--json", type=Path, required=True)
    given_words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        try_many(given_words.examples, trial)
    ordered = sorted(trial.seconds)
    result = {
        "command": f"make fuzz (tests/data/fuzzing.py --examples {given_words.examples})",
        "n": len(ordered),
        "faults": len(trial.faults),
        "tracebacks": sum(n for name, n in trial.outcomes.items() if name.endswith("traceback")),
        "seconds_max": round(ordered[-1], 4),
        "seconds_p99": round(ordered[int(0.99 * len(ordered))], 4),
        "stalls_timed_again": trial.stalls,
        "slower_than_1_s": sum(seconds > 1 for seconds in ordered),
        "outcomes": dict(sorted(trial.outcomes.items())),
    }
    given_words.json.parent.mkdir(parents=True, exist_ok=True)
    given_words.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    for fault in trial.faults[:3]:
        print(fault)
    raise SystemExit(bool(trial.faults) or ordered[-1] > 1)


if __name__ == "__main__":
    main()
