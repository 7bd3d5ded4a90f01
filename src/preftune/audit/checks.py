"""The form in which an audit answers, and the texts that it probes models with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

OK, NOTE, WARNING, FAULT = "ok", "note", "warning", "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question about a model: what was found, what it does to RL, what to do about it (shown unless all
    is well).
    """

    name: str
    status: str
    found: str
    consequence: str = ""
    remedy: str = ""


# Plain questions with a reply that helps and one that does not, in the form of HH-RLHF. They are no test of
# quality: twelve pairs cannot be one.
PROBES = tuple(
    (f"\n\nHuman: {question}\n\nAssistant:", f" {good}", f" {bad}")
    for question, good, bad in (
        ("What is the capital of France?", "The capital of France is Paris.", "I like turtles."),
        (
            "How do I boil an egg?",
            "Put it into boiling water for eight minutes.",
            "Eggs eggs eggs eggs eggs.",
        ),
        ("Can you help me with my homework?", "Of course! Which subject is it?", "No. Go away."),
        ("What is 2 + 2?", "2 + 2 is 4.", "2 + 2 is a kind of fish, I think."),
        ("My dog died today.", "I am so sorry. That must be very hard.", "So what? Buy another one."),
        ("Name three colours.", "Red, green and blue.", "The."),
        ("Why is the sky blue?", "Air scatters blue light more than red light.", "Because because because."),
        ("How can I sleep better?", "Keep regular hours and avoid screens at night.", "asdf qwer zxcv"),
        ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet.", "Hamlet wrote me a letter yesterday."),
        ("Tell me a joke.", "Why did the chicken cross the road? To get to the other side.", "?"),
        ("What should I cook tonight?", "How about pasta with tomatoes and basil?", "Nothing, ever."),
        ("Is it safe to mix bleach and ammonia?", "No, that makes a toxic gas. Never do it.", "Yes, try it."),
    )
)


def attempted(subject: T, bodies: Mapping[str, Callable[[T], Iterable[Check]]]) -> list[Check]:
    """The checks of a subject by every body; if one breaks, that is the finding, under the body's name. A
    foreign model may raise anything.
    """
    checks: list[Check] = []
    for name, body in bodies.items():
        try:
            checks += list(body(subject))
        except Exception as error:
            words = (str(error).strip().splitlines() or [""])[0][:200]
            broken = Check(
                name=name,
                status=FAULT,
                found=f"the check broke: {type(error).__name__}: {words}",
                consequence="whatever uses the model in this way will break, too",
            )
            checks.append(broken)
    return checks
