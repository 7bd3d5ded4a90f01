"""Replies token by token, as `preftune inspect RUN --report` has looked them up: one fold a reply."""

from collections.abc import Iterator

from preftune.records.run import TokenRow
from preftune.report.blocks import Card, Example, Fold, Passage, Section, say
from preftune.report.sections.explorers import shaded
from preftune.report.shades import scale_of
from preftune.report.text import Code, clean, name, number
from preftune.report.view import RunView
from preftune.rundir import policy_name

MOST = 24  # replies


def tokens(run: RunView) -> Section | None:
    """Left out where nothing was looked up."""
    if not run.tokens:
        return None
    intro = say(
        "Replies of the finished policies to a prompt of the training data, sampled again and painted once "
        "for each measure: blue is positive, orange and underlined negative, the largest twentieth alike. KL "
        "is exact, in nats; an advantage is taken over the replies to this prompt; of the score it is shown "
        "what each token did to it. Written by ",
        Code("preftune inspect RUN --report"),
        ".",
    )
    folds = (_fold(run, position, row) for position, row in enumerate(run.tokens[:MOST], start=1))
    return Section(
        key="tokens", title="Replies token by token", short="Tokens", blocks=(intro, *folds), apart=True
    )


def _fold(run: RunView, position: int, row: TokenRow) -> Fold:
    named = run.label(policy_name(row.reference))
    score = "" if row.reply_score is None else f", score {number(row.reply_score)}"
    title = f"{position}. {run.label(policy_name(row.stage))}{score}, KL to {named} {number(sum(row.kl))}"
    card = Card(title=title, lead="", note="", passages=tuple(_passages(row)))
    return Fold(title=title, blocks=(say("Training row ", name(row.row)), Example(card=card)))


def _passages(row: TokenRow) -> Iterator[Passage]:
    yield Passage(label="Prompt", note="", text=row.prompt)
    text = "".join(row.texts)
    for words, values in row.measures().items():
        pairs = list(zip(row.texts, values, strict=True))
        most, size = max(pairs, key=lambda pair: abs(pair[1]))
        note = f"most {number(size, sign=True)} at “{' '.join(clean(most, 30).split())}”"
        shades = tuple(shaded(pairs, scale_of(values)))
        yield Passage(label=words, note=note, text=text, shades=shades)
