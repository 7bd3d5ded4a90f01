"""What a run says of itself and what its policies said: run.json, origins.json, data.json, the samples."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

from pydantic import AliasChoices, Field, model_validator

from preftune.records.base import Number, Record, Several


class RunRecord(Record):
    """run.json: who made the run, and on what."""

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "remove it and run the same command, which describes that command instead"

    seed: int | None = None
    command: Several[str] = ()
    python: str = ""
    platform: str = ""
    processor: str = ""
    cores: int | None = None
    threads: int | None = None
    world_size: int | None = None  # processes that began it
    kernel: str = ""
    devices: Several[str] = ()
    versions: Mapping[str, str | None] = Field(default_factory=dict)
    commit: str = ""
    base: Mapping[str, str] = Field(default_factory=dict)  # name and commit of a base model of the hub
    precision: str | None = None  # what `auto` is in this run


class OriginsRecord(Record):
    """origins.json: the recipe, and by dotted key default, recipe or command line."""

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "run the command that made the run (preftune run RECIPE), which writes it again"

    recipe: str = ""
    origins: Mapping[str, str] = Field(default_factory=dict)


class DataFile(Record):
    """A file that was read: its rows."""

    path: str = "?"
    split: str | None = None
    read: int | None = None
    kept: int | None = None
    skipped: int | None = None
    sha256: str | None = None


class DataRecord(Record):
    """data.json. Typed is what has a place of its own in the report; `facts` is the whole, whose other keys
    depend on where the data came from and are shown as they are.
    """

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = OriginsRecord.remedy

    rows_read: int | None = None
    rows_kept: int | None = None
    rows_skipped: int | None = None
    rejected: Mapping[str, int] = Field(default_factory=dict)  # rows by reason
    reasons: Mapping[str, str] = Field(default_factory=dict)  # the same in words
    notes: Several[str] = ()
    files: Several[DataFile] = ()
    splits: Mapping[str, int] = Field(default_factory=dict)
    distinct_prompts: Mapping[str, int] = Field(default_factory=dict)
    prompt_overlap: Mapping[str, int] = Field(default_factory=dict)  # by "split/split"
    words: Mapping[str, Mapping[str, Several[int]]] = Field(default_factory=dict)  # median, 95 %, most
    content_sha256: Mapping[str, str] = Field(default_factory=dict)
    world: Mapping[str, Any] = Field(default_factory=dict)
    facts: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, row: Any) -> Any:
        return {**row, "facts": dict(row)} if isinstance(row, Mapping) else row


class SampleRow(Record):
    """A policy's response to one prompt. KL to the reference in nats, length in tokens."""

    row: int | None = None
    prompt: str = ""
    response: str = ""
    score: Number | None = None
    gold: Number | None = None
    held_out: Number | None = None  # score by a reward model that trained no policy
    members: Several[Number] = ()  # the scores of an ensemble's members
    kl: Number | None = None
    k1: Number | None = None
    length: int | None = None
    ended: bool | None = None


TOKENS = "tokens.jsonl"  # in analysis/


class TokenRow(Record):
    """A reply token by token, as `preftune inspect RUN --report` wrote it. Each list has a number a token, or
    is empty: log π/π_ref, exact KL(π || π_ref) in nats, the advantage, the score if the reply ended there.
    """

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "preftune inspect RUN --report makes it again"

    stage: str
    key: str = ""  # of the stage that made the policy
    reference: str = ""
    row: str = ""  # of the training data
    prompt: str = ""
    texts: Several[str] = ()
    log_ratio: Several[Number] = ()
    kl: Several[Number] = ()
    advantage: Several[Number] = ()
    score: Several[Number] = ()
    reply_score: Number | None = Field(default=None, validation_alias=AliasChoices("reply_score", "reward"))
    ended: bool | None = None

    @model_validator(mode="after")
    def _one_a_token(self) -> Self:
        for name in MEASURES:
            if (numbers := getattr(self, name)) and len(numbers) != len(self.texts):
                raise ValueError(f"{name} has {len(numbers)} numbers for {len(self.texts)} tokens")
        return self

    def measures(self) -> Mapping[str, Sequence[float]]:
        """What there is, by name; of the score, what each token did to it."""
        values = {words: list(getattr(self, name)) for name, words in MEASURES.items() if getattr(self, name)}
        if scores := values.get(MEASURES["score"]):
            values[MEASURES["score"]] = [0.0, *(after - before for before, after in pairwise(scores))]
        return values


MEASURES = {"log_ratio": "log-ratio", "kl": "KL", "advantage": "advantage", "score": "change of the score"}
