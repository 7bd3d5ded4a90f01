"""The parts of an evaluation, each kept on disk when it is finished: an interrupted one goes on from there.

A part is one policy's responses, the pool of best-of-n, or the examination of one reward model. All numbers
that are computed from them take seconds and are computed again.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.data import Preference
from preftune.errors import DataError
from preftune.faults import faultpoint
from preftune.models.trunk import forget_states
from preftune.rundir import plain, read_json, write_jsonl
from preftune.sums import sum_of
from preftune.training.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Values by name in `directory`. `inputs` is what all of them depend on: with others, none is used."""

    directory: Path
    inputs: Mapping[str, Any]
    say: Callable[[str], None] = print
    # Of the processes that take each part together; the main one has the files.
    learner: Learner | None = None

    def take(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The value of `make`, from disk if it was made before with the same inputs.

        It comes as it is read from a file in both cases, so that a resumed evaluation cannot differ from
        another: a tuple is a list.
        """
        file = self.directory / f"{name}.json"
        key = sum_of({**self.inputs, "part": name, "of": dict(inputs)})
        main = self.learner is None or self.learner.is_main
        cached = self._stored(file, key) if main else None
        if self.learner is not None:
            cached = self.learner.gather_items([cached])[0]
        if cached is not None:
            self.say(f"evaluation of {name}: already measured")
            return cached["value"]
        forget_states()
        value = json.loads(json.dumps(plain(make())))
        faultpoint("evaluation.part")
        # One line: indented, every token id would stand on a line of its own.
        if main:
            write_jsonl(file, [{"key": key, "sha256": sum_of({"value": value}), "value": value}])
        return value

    def remove(self) -> None:
        """The results are written: nothing is left to resume."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _stored(self, file: Path, key: str) -> dict[str, Any] | None:
        """What a file holds, unless it was made with other inputs or is damaged."""
        if not file.is_file():
            return None
        try:
            record = read_json(file)
        except DataError:
            record = None
        if not isinstance(record, dict) or record.get("sha256") != sum_of({"value": record.get("value")}):
            self.say(f"{file} is damaged; making it again")
            return None
        return record if record.get("key") == key else None


def content(pairs: Sequence[Preference]) -> str:
    """SHA-256 of pairs in their order: texts, sources (an examination goes by them), which replies ended."""
    rows = [[p.prompt.transcript(), p.chosen, p.rejected, p.source, p.ended] for p in pairs]
    return sum_of({"pairs": rows})
