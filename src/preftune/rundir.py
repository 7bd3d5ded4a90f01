"""The run directory: every file name, and how its files are read and written. Standard library only.

Training writes, the report reads; this module is all they share. Writes are atomic (a temporary file beside
the target, then a rename), so a reader sees the old text or the new, never half. JSON has no NaN or infinity:
they stand in a file as the strings "NaN", "Infinity" and "-Infinity" and are floats again when it is read;
text that is spelt like one of them gets a backslash in front there, and loses it here.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.errors import (
    DataError,
    InputMissing,
    PermissionMissing,
    StorageError,
    from_system,
)

BASE = "base"
MAX_DEPTH = 100  # of lists and objects in each other; what is shown or summed is walked by functions as deep
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SPELT_LIKE_ONE = re.compile(r"\\*(NaN|-?Infinity)")
_DAMAGED = "the file is damaged: restore it from a copy, or make it again"


class RunDir:
    """Paths of one run; creates nothing. Policies are called "base", "policy_<stage>" and "best_of_<n>"."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"  # the frozen settings
        self.run = self.path / "run.json"  # versions, commit, command, devices, seed
        # Recipe, and where each setting comes from: default, recipe or command line.
        self.origins = self.path / "origins.json"
        self.data = self.path / "data.json"  # rows read, kept, rejected by reason, hashes
        self.lock = self.path / ".lock"  # held by the process that writes here
        # Says that preftune made this directory, with the sums of the files above.
        self.marker = self.path / ".preftune"
        self.aside = self.path / ".aside"  # stages that are being made anew: the old ones
        # What the report was made from, and the sums of its files.
        self.report_record = self.path / ".report.json"
        self.report_page = self.path / "report.html"
        self.analysis_text = self.path / "ANALYSIS.md"
        self.figures = self.path / "figures"  # directory of SVG files
        self.models = self.path / "models"
        self.stages = self.path / "stages"
        self.collections = self.path / "collected"
        self.evaluations = self.path / "evaluation"
        self.logs = self.path / "logs"
        # Validation pairs on which the reward model errs or ties.
        self.mistakes = self.path / "analysis" / "reward_model_mistakes.jsonl"
        self.analysis_details = self.mistakes.parent  # directory of what ANALYSIS.md links
        self.reward_evaluation = self.evaluation("reward_model")
        # One row per policy and measure: the paired difference to the reference.
        self.comparisons = self.evaluations / "comparisons.jsonl"
        self.best_of_n = self.evaluation("best_of_n")  # the curve of best-of-n of the reference

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def exists(self) -> bool:
        """Whether this is a run's directory, be it a damaged one; what cannot be looked at is none."""
        return os.path.isfile(self.config) or os.path.isdir(self.stages)

    def log(self, attempt: int) -> Path:
        return self.logs / f"attempt-{attempt}.log"

    def next_attempt(self) -> int:
        """1 for a new run, otherwise one more than the last log's number."""
        numbers = (log.stem.removeprefix("attempt-") for log in self.logs.glob("attempt-*.log"))
        return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1

    def model_dir(self, stage: str, *, trains_policy: bool = True) -> Path:
        """Where a stage saves: reward_model (of "rm"), reward_model_<stage>, policy_<stage>; or base."""
        if trains_policy or stage == BASE:
            return self.models / policy_name(stage)
        return self.models / ("reward_model" if stage == "rm" else f"reward_model_{stage}")

    def collected(self, stage: str) -> Path:
        """Directory of what a stage collected: replies.jsonl and preferences.jsonl."""
        return self.collections / stage

    def stage_dir(self, stage: str) -> Path:
        return self.stages / stage

    def stage_json(self, stage: str) -> Path:
        """Status, input hashes and timing of a stage."""
        return self.stage_dir(stage) / "stage.json"

    def metrics(self, stage: str) -> Path:
        """One row a step: {"step", "time", metrics}."""
        return self.stage_dir(stage) / "metrics.jsonl"

    def ledger(self, stage: str) -> Path:
        """One row a step: {"step", "rows"}, the data rows that it consumed."""
        return self.stage_dir(stage) / "ledger.jsonl"

    def preferences(self, stage: str) -> Path:
        """The pairs that a stage made of its replies, in TRL's format."""
        return self.collected(stage) / "preferences.jsonl"

    def replies(self, stage: str) -> Path:
        """Replies that a stage has collected so far; they go when it is done."""
        return self.stage_dir(stage) / "replies.jsonl"

    def answers(self, stage: str) -> Path:
        """What a language model has answered to it so far, by question; they go when it is done."""
        return self.stage_dir(stage) / "answers.jsonl"

    def live(self, stage: str) -> Path:
        """What those who look on are told of a stage that is under way; it goes when that is done."""
        return self.stage_dir(stage) / "live.json"

    def checkpoints(self, stage: str) -> Path:
        """Directory of step-N directories."""
        return self.stage_dir(stage) / "checkpoints"

    def samples_file(self, policy: str, model: str = "") -> Path:
        """Samples of a policy. For "base", `model` is model.base: "openai-community/gpt2" gives base_gpt2."""
        name = f"{BASE}_{short_name(model)}" if policy == BASE and model else policy
        return self.path / "samples" / f"{name}_samples.jsonl"

    def samples_files(self) -> dict[str, Path]:
        """Sample files that exist, by policy name, base first."""
        files = {}
        for path in sorted((self.path / "samples").glob("*_samples.jsonl")):
            name = path.name.removesuffix("_samples.jsonl")
            files[BASE if name.startswith(f"{BASE}_") else name] = path
        return files

    def evaluation(self, policy: str) -> Path:
        return self.evaluations / f"{policy}.json"

    def labels(self, name: str) -> Path:
        """Directory of a set of items that people judge, with their judgements."""
        return self.path / "labels" / name

    def pairs(self, name: str) -> Path:
        """Directory of an evaluation on a foreign preference file."""
        return self.evaluations / f"pairs-{name}"

    def pairs_records(self) -> list[Path]:
        """The records of evaluations on foreign preference files that are there."""
        return sorted(self.evaluations.glob("pairs-*/pairs.json"))


def policy_name(stage: str) -> str:
    """Name of the policy that a stage trains: "ppo" gives "policy_ppo"; of the base it is "base"."""
    return BASE if stage == BASE else f"policy_{stage}"


def short_name(model: str) -> str:
    """A model's name fit for a file name: the last part of a hub id or path, without .gguf."""
    last = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9.-]+", "-", last).strip("-.") or "model"


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises InputMissing, PermissionMissing or DataError, each naming the file."""
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", _DAMAGED) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError:
        raise PermissionMissing(f"cannot read {path}: permission denied") from None
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically, making its directory. Raises StorageError or PermissionMissing."""
    _replace(path, text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises as `read_text`, and DataError for malformed JSON."""
    try:
        return decoded(json.loads(read_text(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg})", _DAMAGED) from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise DataError(f"{path}: not valid JSON ({error})", _DAMAGED) from None
    except RecursionError:
        raise DataError(f"{path}: brackets are nested too deep", _DAMAGED) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises as `read_json`, and DataError for another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object", _DAMAGED)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    _replace(path, json_text(value).encode("utf-8"))


def write_result(path: Path, value: Any) -> None:
    """As `write_json`, to a place that a person named: a device or a pipe is written to, not replaced."""
    if path.is_file() or path.is_dir() or not path.exists():
        write_json(path, value)
        return
    with _failures(path), path.open("ab") as file:
        file.write(json_text(value).encode("utf-8"))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return _encode(value, indent=2).decode("utf-8") + "\n"


def read_jsonl(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file.

    A torn last line, left by a killed process, is dropped, unless the file is a finished, `whole` one;
    another bad line raises DataError with its number.
    """
    # Split at "\n" only: text may hold U+2028 and others that str.splitlines takes for line ends.
    lines = _read_bytes(path).split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = decoded(json.loads(line))
            if not isinstance(row, dict):
                raise ValueError("expected a JSON object")
            rows.append(row)
        except ValueError as error:  # not JSON, or not UTF-8
            if number == len(lines) and not whole:
                break
            raise DataError(f"{path}:{number}: not valid JSON ({error})", _DAMAGED) from None
        except RecursionError:
            raise DataError(f"{path}:{number}: brackets are nested too deep", _DAMAGED) from None
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines, one object a line, atomically."""
    _replace(path, b"".join(_encode(row) + b"\n" for row in rows))


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSON Lines file, after cutting off a torn last line."""
    with _failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _cut_torn_line(file)
            file.write(_encode(row) + b"\n")


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to the disk; Windows does the latter by itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """A copy as it comes back from a file: tuples are lists, paths and keys are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def each_leaf(value: Any, change: Callable[[Any], Any], room: int = MAX_DEPTH) -> Any:
    """A copy of lists and dicts in which whatever else they hold is changed. RecursionError if too deep."""
    if room < 0:
        raise RecursionError
    if isinstance(value, dict):
        return {key: each_leaf(item, change, room - 1) for key, item in value.items()}
    return [each_leaf(item, change, room - 1) for item in value] if isinstance(value, list) else change(value)


def _strict(leaf: Any) -> Any:
    """A leaf as strict JSON can hold it (see the top of this file)."""
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "NaN" if math.isnan(leaf) else "Infinity" if leaf > 0 else "-Infinity"
    return f"\\{leaf}" if isinstance(leaf, str) and _SPELT_LIKE_ONE.fullmatch(leaf) else leaf


def decoded(value: Any) -> Any:
    """What `_encode` was given, from the value that its JSON has."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, str) or not _SPELT_LIKE_ONE.fullmatch(leaf):
            return leaf
        return _NOT_FINITE[leaf] if leaf in _NOT_FINITE else leaf[1:]

    return each_leaf(value, change)


def _encode(value: Any, indent: int | None = None) -> bytes:
    simple = each_leaf(plain(value), _strict)
    try:
        return json.dumps(simple, indent=indent, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair in the text: UTF-8 cannot hold it, an escape can
        return json.dumps(simple, indent=indent, allow_nan=False).encode("ascii")


def _cut_torn_line(file: Any) -> None:
    """Drop bytes after the last line end."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with _failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Turn a failed write into an error for people."""
    try:
        yield
    except OSError as error:
        explained, message = from_system(error), f"cannot write {path}: {error.strerror}"
        if isinstance(explained, PermissionMissing):
            raise PermissionMissing(message, "choose another place with --out DIR") from error
        raise StorageError(message, explained.hint if isinstance(explained, StorageError) else "") from error
