"""One conversation with several policies: all reply to the same turns; it goes on with one of the replies.

Replies are sampled and measured as in the evaluation, in the form that the run trained with. A preference is
kept as TRL's rows in chats/preferences.jsonl of the run, where `stage.NAME.data` finds it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preftune.data import Dialogue, Preference, Turn
from preftune.data.pairing import prompt_of, reply_of
from preftune.errors import DataError, UsageError
from preftune.evaluation.policy import Conditions, Row
from preftune.measure.conditions import frozen_policy, make_conditions, policies_of, reference_stage
from preftune.models.roles import Policy
from preftune.rundir import RunDir, append_jsonl
from preftune.runs.session import Session
from preftune.seeding import derive_seed
from preftune.sums import refuse_links


def preferences_file(run: RunDir) -> Path:
    """Where what was preferred in conversations is kept."""
    return run.path / "chats" / "preferences.jsonl"


@dataclass(slots=True, kw_only=True)
class Talk:
    """The state of a conversation. `prompts` is the list that `conditions` reads its prompt from."""

    run: RunDir
    conditions: Conditions
    prompts: list[Preference]
    policies: Mapping[str, Policy]
    seed: int
    turns: list[Turn] = field(default_factory=list)
    replies: list[Row] = field(default_factory=list)  # to the last turn, one a policy
    draws: int = 0  # so far: each has a seed of its own

    def say(self, text: str) -> list[Row]:
        """What every policy replies. An unanswered turn before it goes on with the first reply."""
        if self.replies:
            self.take(0)
        self.turns.append(Turn("human", f" {text.strip()}"))
        try:
            return self.other_replies()
        except Exception:
            self.turns.pop()  # what has no reply was not said
            raise

    def other_replies(self) -> list[Row]:
        """Other replies to the same turns. UsageError where nothing was said since a reply was taken."""
        if not self.turns or self.turns[-1].role != "human":
            since = "since that reply was taken" if self.turns else "yet"
            raise UsageError(f"nothing was said {since}", "write something first")
        dialogue = Dialogue(self.turns)
        self.prompts[:] = [Preference(prompt=dialogue, chosen="", rejected="", row=0)]
        conditions = replace(
            self.conditions, seed=derive_seed(self.seed, "chat", self.draws), gold=self._gold(dialogue)
        )
        self.draws += 1
        self.replies = [conditions.rows(policy, lambda n: None)[0] for policy in self.policies.values()]
        return self.replies

    def _gold(self, dialogue: Dialogue) -> Any:
        """The world's score by rule, for a prompt that the world makes."""
        if self.conditions.gold is not None:
            with suppress(DataError):
                self.conditions.gold(dialogue.transcript(), "", True)
                return self.conditions.gold
        return None

    def take(self, index: int) -> None:
        """Go on with one of the replies."""
        self.turns.append(Turn("assistant", self.replies[index]["response"]))
        self.replies = []

    def better(self, index: int) -> int:
        """Save that one reply is better than every other one, and continue with it. Returns how many pairs
        that made: a reply of the same text makes none.
        """
        plain, names = self.conditions.encoder.form == "plain", list(self.policies)
        chosen, prompt = self.replies[index], prompt_of(Dialogue(self.turns), plain)
        refuse_links(self.run)
        pairs = 0
        for rival, row in enumerate(self.replies):
            if row["response"].strip() == chosen["response"].strip():
                continue
            append_jsonl(
                preferences_file(self.run),
                {
                    "prompt": prompt,
                    "chosen": reply_of(chosen["response"], plain),
                    "rejected": reply_of(row["response"], plain),
                    "ended_chosen": chosen["ended"],
                    "ended_rejected": row["ended"],
                    "policy_chosen": names[index],
                    "policy_rejected": names[rival],
                    "judge": "people:chat",
                },
            )
            pairs += 1
        self.take(index)
        return pairs

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns, self.replies = [], []


def open_talk(
    session: Session, names: Sequence[str], seed: int, temperature: float | None, max_new_tokens: int | None
) -> Talk:
    """The policies of a run, with all that measures their replies."""
    if temperature == 0:
        raise UsageError("greedy replies have no KL", "give a small --temperature such as 0.1, or use sample")
    trained = [name for name in policies_of(session, list(session.config.stage)) if session.is_trained(name)]
    prompts = list[Preference]()
    conditions, learner = make_conditions(session, reference_stage(session, trained), prompts, session.gold)
    settings = conditions.settings.model_copy(update=changed_settings(temperature, max_new_tokens))
    encoder = session.encoder(session.source(names[0]), settings.max_new_tokens)
    return Talk(
        run=session.run,
        conditions=replace(conditions, settings=settings, encoder=encoder),
        prompts=prompts,
        policies={name: frozen_policy(session, learner, name) for name in names},
        seed=seed,
    )


def changed_settings(temperature: float | None, max_new_tokens: int | None) -> dict[str, Any]:
    """What is asked for instead of the evaluation's settings. UsageError for what cannot be sampled."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature {temperature} is no temperature", "0 is greedy, 1 as trained")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: 1 is the least", "give a larger number")
    changes = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    return {key: value for key, value in changes.items() if value is not None}
