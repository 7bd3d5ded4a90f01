"""study/seed.json and study/<policy>.json of a study's seed: facts about it, and values prompt by prompt."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AliasChoices, Field, model_validator

from preftune.records.base import Number, Record, Several

_SCORE = AliasChoices("score", "proxy")  # its name before


class _OfSeed(Record):
    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "remove its directory and run the same command: it measures that seed again"


class Share(Record):
    """A share of pairs with its interval."""

    value: Number
    interval: Annotated[tuple[Number, Number], Field(strict=False)]
    n: int


class PartGap(Record):
    """Pairs that differ in one part of gold alone: mean margin in sd of the scores, and accuracy."""

    gap_sd: Number
    value: Number
    n: int


class FreshAccuracy(Record):
    """The reward model on pairs and probes of one kind of prompt that no stage has seen."""

    accuracy: Share
    best_reachable: Number
    gaps: Mapping[str, PartGap]


class SeedRecord(_OfSeed):
    """seed.json. Tokens (trained, sampled) and steps by policy; hashes of the data by split, and of the
    functions and judges of gold; by stage, a hash of what it was made of but for seed and data.
    """

    seconds: Number
    policies: Several[str]
    reference: str
    reward_model: Mapping[str, FreshAccuracy] | None = None
    content_sha256: Mapping[str, Any] | None = None
    judged_by: Mapping[str, Any] | None = None
    gold_apart: bool | None = None  # a second reward model shared no prompt with the judge; None: not known
    stages: Mapping[str, str] | None = None
    tokens: Mapping[str, Mapping[str, Annotated[int, Field(lt=2**63)] | float]]


def _same_prompts(sizes: Iterable[int]) -> None:
    different = set(sizes)
    if len(different) > 1 or 0 in different:
        raise ValueError("measures of one set are of no prompts, or of different numbers of them")


class PolicyValues(Record):
    """Means over the replies to each prompt of a set; `win` and `gold_win` against the reference."""

    gold: Several[Number]
    score: Several[Number] = Field(validation_alias=_SCORE)
    kl: Several[Number]
    length: Several[Number]
    ended: Several[Number]
    repetition_4: Several[Number]
    win: Several[Number] | None = None
    gold_win: Several[Number] | None = None
    golds: Mapping[str, Several[Number]] = Field(default_factory=dict)  # of the judges after the first
    distinct_2: Number | None = None  # of all replies together
    distinct_2_rarefied: Number | None = None  # of 192 of them, see study.beside
    base_nll: Number | None = None  # of the first reply to each prompt under the base, nats a token

    @property
    def columns(self) -> dict[str, Several[Number]]:
        """What there is a value of for every prompt, but for other judges' scores."""
        return {name: values for name, values in self if isinstance(values, tuple)}

    @model_validator(mode="after")
    def _even(self) -> Self:
        _same_prompts(map(len, [*self.columns.values(), *self.golds.values()]))
        return self


class BestValues(Record):
    """Best-of-n, n = 1, 2, ...: (prompts, n) for each measure; `kl` by formula, (n,)."""

    gold: Several[Several[Number]]
    score: Several[Several[Number]] = Field(validation_alias=_SCORE)
    length: Several[Several[Number]]
    ended: Several[Several[Number]]
    repetition_4: Several[Several[Number]]
    win: Several[Several[Number]]
    gold_win: Several[Several[Number]]
    golds: Mapping[str, Several[Several[Number]]] = Field(default_factory=dict)
    kl: Several[Number]

    @property
    def columns(self) -> dict[str, Any]:
        """The tables and `kl`, but for other judges' scores."""
        return {name: values for name, values in self if isinstance(values, tuple)}

    @model_validator(mode="after")
    def _even(self) -> Self:
        tables = [values for name, values in self.columns.items() if name != "kl"]
        tables += self.golds.values()
        if any(len(row) != len(self.kl) for table in tables for row in table):
            raise ValueError("a prompt has not one value for each n")
        _same_prompts(len(table) for table in tables)
        return self


class PolicyFile(_OfSeed):
    """<policy>.json: a policy's values by set of prompts."""

    sets: Mapping[str, PolicyValues]


class BestFile(_OfSeed):
    """best_of_n.json."""

    sets: Mapping[str, BestValues]
