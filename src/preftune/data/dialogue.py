"""Text between parsing and encoding: turns, dialogues, and the kinds of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from preftune.data.checks import BadRow, truth_of

Role = Literal["human", "assistant", "system"]
# As messages, templates and TRL call them.
ROLES: Mapping[Role, str] = {"human": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance. `text` is verbatim, its leading whitespace included (" Hi" in an HH transcript)."""

    role: Role
    text: str


class Dialogue(tuple[Turn, ...]):
    """A frozen sequence of turns, the only form of text between parsing and encoding."""

    __slots__ = ()

    def transcript(self) -> str:
        r"""The dialogue in HH-RLHF form with a reply opened: `\n\nHuman: Hi\n\nAssistant:`.

        It always ends exactly in "Assistant:", also after an assistant turn (HH has such rows), so that
        `transcript() + response` is the whole text, and a response starting with a space is tokenised the
        same alone as joined to its prompt.
        """
        names = {"human": "Human", "assistant": "Assistant", "system": "System"}
        return "".join(f"\n\n{names[turn.role]}:{turn.text}" for turn in self) + "\n\nAssistant:"

    def __str__(self) -> str:
        return self.transcript()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One judgement, by people or by a model: `chosen` was preferred to `rejected` as the reply to `prompt`.

    Rows of other kinds are stored in it, too: what is to be imitated, a text without a prompt as well, is
    `chosen`, an undesirable reply `rejected`, and what is not there is "".
    """

    prompt: Dialogue
    chosen: str
    rejected: str
    source: str = ""  # subset the pair came from, e.g. "harmless-base"
    row: int = -1  # position in the split it was read into
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)  # others, for reward functions

    @property
    def ended(self) -> tuple[bool, bool]:
        """Whether chosen and rejected came to their end. People's replies did; a policy's that was cut at its
        token limit did not, and a stage that collects says so in columns `ended_chosen`, `ended_rejected`.
        """
        chosen, rejected = (self.columns.get(f"ended_{name}", True) for name in ("chosen", "rejected"))
        return _reply_ended(chosen), _reply_ended(rejected)


def _reply_ended(value: Any) -> bool:
    """Whether a column says that the reply ended, also as text in a CSV. A value that is neither true nor
    false counts as true.
    """
    try:
        return truth_of(value, "")
    except BadRow:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One of several rated replies to a prompt; rows of the same prompt become pairs once a file is read."""

    prompt: Dialogue
    response: str
    score: float


Row = Preference | Scored
Kind = Literal["pairs", "unpaired", "prompts", "text"]
