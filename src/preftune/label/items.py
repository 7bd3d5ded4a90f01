"""What is judged: a prompt with two replies, collected by a stage or sampled from two policies."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import pstdev
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from preftune.config import config_of
from preftune.data.dialogue import ROLES, Dialogue, Turn
from preftune.data.hh import MARKER, parse_prompt
from preftune.errors import DataError, InputMissing, UsageError
from preftune.records.base import Number, Record, Several, read_record, read_records
from preftune.records.outdated import AGAIN, Outdated, outdated
from preftune.records.policy import PolicyRecord
from preftune.records.run import SampleRow
from preftune.report.load import settings_of
from preftune.rundir import RunDir, policy_name
from preftune.seeding import derive_seed

Two = Annotated[tuple[str, str], Field(strict=False)]
SYSTEM = "\n\nSystem:"  # as a sample's prompt begins where there is such a turn


class Message(Record):
    """One turn, as TRL writes it."""

    role: str
    content: str


class Item(Record):
    """Two replies to a prompt; `names` says whose they are, which no rater is shown."""

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "restore the set's items.jsonl from a copy, or begin another set with --set NAME"

    id: str
    row: int | None = None
    prompt: Several[Message]
    replies: Two
    names: Two
    scores: Annotated[tuple[Number, Number], Field(strict=False)] | None = None
    ended: Annotated[tuple[bool, bool], Field(strict=False)] | None = None  # or cut at the limit of tokens
    disagreement: Number | None = None  # sd among an ensemble's members of the difference of these scores

    @property
    def certainty(self) -> float:
        """What an order by information goes by, the least first: minus the disagreement of an ensemble, else
        how far apart the reward model sees the replies; infinite where it saw none.
        """
        if self.disagreement is not None:
            return -self.disagreement
        return float("inf") if self.scores is None else abs(self.scores[0] - self.scores[1])


class Collected(Record):
    """A row of collected/STAGE/replies.jsonl."""

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "run the stage that collects again"

    row: int | None = None
    prompt: str | Several[Message]
    replies: Several[str]
    scores: Several[Number | None] = ()
    members: Several[Several[Number]] = ()
    ended: Several[bool] = ()


class Chosen(NamedTuple):
    """Where items come from: a file of collected replies, or two policies' samples. `old_scores`: whose the
    samples' scores are, where that model is no longer there.
    """

    name: str
    files: tuple[Path, ...]
    policies: tuple[str, ...] = ()
    old_scores: str = ""


def find_source(run: RunDir, source: str | None) -> Chosen:
    """`source` is a stage that collected replies, or two policies `A,B`; None is the one stage that
    collected, else SFT against the last policy. Raises UsageError and InputMissing. That there are samples,
    and of today's models, is left to `readable`: a set that has been begun needs none.
    """
    collected = {path.parent.name: path for path in sorted(run.collections.glob("*/replies.jsonl"))}
    if source is not None and "," not in source:
        if source not in collected:
            have = f"one of {', '.join(collected)}; " if collected else ""
            raise UsageError(
                f"{run.path} holds no replies collected by {source!r}", f"{have}or two policies: A,B"
            )
        return Chosen(source, (collected[source],))
    if source is None and len(collected) == 1:
        ((name, path),) = collected.items()
        return Chosen(name, (path,))
    if source is None and collected:
        raise UsageError(f"several stages collected: {', '.join(collected)}", "--from STAGE names one")
    return _two_policies(run, source)


def _two_policies(run: RunDir, source: str | None) -> Chosen:
    files = run.samples_files()
    if source is None:
        stages = settings_of(run).get("stage", {})
        kinds = {name: config_of(str(stage.get("algorithm"))) for name, stage in stages.items()}
        imitating = [policy_name(name) for name, kind in kinds.items() if kind is not None and kind.imitates]
        trained = [policy_name(name) for name in kinds if policy_name(name) in files]
        pair = [*imitating[:1], *trained[-1:]]
    else:
        pair = [name if name in files else policy_name(name) for name in source.split(",")]
    if not len(pair) == len(set(pair)) == 2:
        raise _no_samples(run, files)
    short = [name.removeprefix(policy_name("")) for name in pair]
    samples = tuple(files[name] for name in pair if name in files)
    return Chosen("-".join((short[0], "against", short[1])), samples, tuple(pair))


def readable(run: RunDir, source: Chosen) -> Chosen:
    """The source, if a set can be begun from it. InputMissing for policies without samples, or whose samples
    are of a model that is no longer there. All scores depend on the judge; of the texts only best-of-n's do.
    """
    if not source.policies:
        return source
    if len(source.files) < len(source.policies):
        raise _no_samples(run, run.samples_files())
    gone = outdated(run)
    scored = _scored_by(run, gone, source.policies)
    stages = dict[str, None]()
    for policy in source.policies:
        stage = policy.removeprefix(policy_name(""))
        stages |= dict.fromkeys(scored if policy.startswith("best_of_") else {stage} & {*gone.stages})
    if stages:
        names = " and ".join(source.name.split("-against-"))
        raise InputMissing(
            f"{run.path}: what was sampled of {names} is {Outdated(tuple(stages)).reason}",
            f"{AGAIN}; --from A,B names two other policies, --set NAME a set that was begun before",
        )
    return source._replace(old_scores=Outdated(scored).reason if scored else "")


def _scored_by(run: RunDir, gone: Outdated, policies: Iterable[str]) -> tuple[str, ...]:
    """The stages without their measured models on which the samples' scores depend; () if they depend on
    none. The second reward model is not among them: its scores are not used here.
    """
    files = [file for policy in policies if (file := run.evaluation(policy)).is_file()]
    second = {read_record(file, PolicyRecord).held_out_by for file in files}
    return tuple(name for name in gone.stages if name not in second) if gone.all else ()


def _no_samples(run: RunDir, files: Iterable[str]) -> InputMissing:
    return InputMissing(
        f"{run.path} holds no samples of two such policies (it has: {', '.join(files) or 'none'})",
        "preftune run RECIPE samples them; --from A,B names two, --from STAGE one that collects",
    )


def read_items(
    source: Chosen, seed: int, *, informative: bool = False, all_pairs: bool = False
) -> list[Item]:
    """Each pair of different replies once, in the order in which they are to be judged: drawn from the seed,
    or the least certain first: the smallest margin or, of an ensemble, the largest disagreement. Of several
    replies to a prompt one pair is drawn, or the least certain, or all are taken.
    """
    rows = _of_policies(source) if source.policies else _collected_rows(source.files[0])
    items: dict[str, Item] = {}
    for prompt, replies, row in rows:
        pairs = [item for two in combinations(replies, 2) if (item := _item(prompt, two, row)) is not None]
        if informative and source.old_scores:
            raise InputMissing(
                f"the scores in {source.files[0]} are {source.old_scores}",
                f"{AGAIN}; or leave --informative out",
            )
        if informative and any(item.scores is None for item in pairs):
            raise UsageError(
                f"{source.files[0]} holds no scores, so that nothing is more informative",
                "leave --informative out, or collect with a reward model as judge",
            )
        pairs.sort(
            key=lambda item: (item.certainty if informative else 0.0, derive_seed(seed, "pair", item.id))
        )
        items |= {item.id: item for item in (pairs if all_pairs else pairs[:1])}
    if not items:
        raise DataError(
            f"{source.files[0]} holds no two different replies to a prompt", "collect more replies"
        )
    ordered = sorted(items.values(), key=lambda item: derive_seed(seed, "order", item.id))
    return sorted(ordered, key=lambda item: item.certainty) if informative else ordered


class Reply(NamedTuple):
    """A reply, whose it is, its score and those of an ensemble's members, and whether it ended."""

    text: str
    name: str
    score: float | None
    members: Sequence[float]
    ended: bool | None


Rows = Iterator[tuple[tuple[Message, ...], Sequence[Reply], int | None]]


def _collected_rows(path: Path) -> Rows:
    for line, row in enumerate(read_records(path, Collected), start=1):
        scores = row.scores or (None,) * len(row.replies)
        members = row.members or ((),) * len(row.replies)
        ended = row.ended or (None,) * len(row.replies)
        for noun, values in (("scores", scores), ("members' scores", members), ("ends", ended)):
            if len(values) != len(row.replies):
                raise DataError(
                    f"{path}:{line}: {len(values)} {noun} of {len(row.replies)} replies", row.remedy
                )
        prompt = _messages(row.prompt) if isinstance(row.prompt, str) else row.prompt
        name = path.parent.name
        scored = zip(row.replies, scores, members, ended, strict=True)
        replies = [Reply(text, name, score, by_member, closed) for text, score, by_member, closed in scored]
        yield prompt, replies, row.row


def _of_policies(source: Chosen) -> Rows:
    first, second = (
        {(row.row, row.prompt): row for row in read_records(path, SampleRow)} for path in source.files
    )
    for key in first:
        if key in second:
            replies = [
                Reply(row.response, name, None, (), row.ended)
                if source.old_scores
                else Reply(row.response, name, row.score, row.members, row.ended)
                for row, name in zip((first[key], second[key]), source.policies, strict=True)
            ]
            yield _messages(key[1]), replies, key[0]


def _messages(prompt: str) -> tuple[Message, ...]:
    """A prompt in one string, as messages; one that is no transcript is what the user said."""
    system, first = list[Turn](), MARKER.search(prompt)
    if first and prompt.startswith(SYSTEM):
        system, prompt = [Turn("system", prompt[len(SYSTEM) : first.start()])], prompt[first.start() :]
    turns = parse_prompt(prompt) if prompt.strip() else Dialogue([Turn("human", prompt)])
    return tuple(Message(role=ROLES[turn.role], content=turn.text.strip()) for turn in (*system, *turns))


def _item(prompt: tuple[Message, ...], two: Sequence[Reply], row: int | None) -> Item | None:
    """The two replies as an item; None if both are the same text, between which nobody can prefer."""
    a, b = two
    if a.text.strip() == b.text.strip():
        return None
    named = json.dumps(
        [[message.role, message.content] for message in prompt] + [a.text, b.text, a.name, b.name]
    )
    return Item(
        id=hashlib.sha256(named.encode()).hexdigest()[:16],
        row=row,
        prompt=prompt,
        replies=(a.text.strip(), b.text.strip()),
        names=(a.name, b.name),
        scores=None if a.score is None or b.score is None else (a.score, b.score),
        ended=None if a.ended is None or b.ended is None else (a.ended, b.ended),
        disagreement=pstdev(x - y for x, y in zip(a.members, b.members, strict=False))
        if a.members and b.members
        else None,
    )
