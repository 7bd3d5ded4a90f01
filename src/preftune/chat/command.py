"""`preftune sample` and `preftune chat`: the commands' options and what each does."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preftune.errors import PreftuneError, UsageError, in_a_directory
from preftune.rundir import BASE, json_text, write_result
from preftune.untrusted import clean, printable

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.chat.talk import Talk
    from preftune.runs.session import Session

Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")]
Policies = Annotated[
    list[str] | None,
    typer.Option(help='A stage that trains a policy, or "base"; may be repeated; "all": every one.'),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sampling temperature; 0 is greedy. By default the evaluation's.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Maximum number of new tokens; by default the evaluation's.")
]
Seed = Annotated[int, typer.Option(help="Seed of the sampler.")]
HELP = """/better a   keep that reply a is better than the others, and go on with it
/use b      go on with reply b; without either, with reply a
/again      other replies to the same
/new        begin anew
/quit       end (or Ctrl-D)"""


def sample(
    run: Run,
    policy: Policies = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to reply to; may be repeated.")] = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            callback=in_a_directory,
            help="Write the replies to FILE as data; - prints it instead.",
        ),
    ] = None,
) -> None:
    """Sample replies from policies, side by side, to your prompts or to held-out ones."""
    from rich.console import Console

    from preftune.chat.columns import show
    from preftune.chat.talk import changed_settings
    from preftune.measure.samples import replies
    from preftune.runs.reopen import reopen

    session, settings = reopen(run, write=False), changed_settings(temperature, max_new_tokens)
    names = _names(session, policy or ["sft"])
    drawn = {name: replies(session, name, prompt or [], seed, 5, settings) for name in names}
    console, rows = Console(highlight=False, soft_wrap=True), list[dict[str, Any]]()
    for rows_of_prompt in zip(*drawn.values(), strict=True):
        rows += [{"policy": name, **row} for name, row in zip(names, rows_of_prompt, strict=True)]
        if json == "-":
            continue
        if len(names) == 1:
            typer.echo(clean(f"{rows_of_prompt[0]['prompt']}{rows_of_prompt[0]['response']}", None) + "\n")
            continue
        typer.echo(clean(rows_of_prompt[0]["prompt"].strip("\n"), None))
        show(
            console,
            names,
            [row["response"] for row in rows_of_prompt],
            ["" if row["ended"] else "cut" for row in rows_of_prompt],
        )
        typer.echo("")
    if json == "-":
        typer.echo(json_text(rows), nl=False)
    elif json is not None:
        write_result(Path(json), rows)


def chat(
    run: Run,
    policy: Policies = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
) -> None:
    """Talk to policies side by side, with score, gold and KL; `/better a` keeps a preference in the run."""
    from rich.console import Console

    from preftune.chat.talk import open_talk, preferences_file
    from preftune.runs.reopen import reopen

    session = reopen(run, write=False)
    names = _names(session, policy or _contestants(session))
    talk = open_talk(session, names, seed, temperature, max_new_tokens)
    console = Console(highlight=False, soft_wrap=True)
    typer.echo(printable(f"{', '.join(names)}; /help says what can be done, Ctrl-D ends it"))
    pairs = 0
    for line in _lines():
        try:
            pairs += _answer(console, talk, line.strip())
        except PreftuneError as error:
            typer.echo(printable(str(error)))
    if pairs:
        file = preferences_file(session.run)
        noun = "pair" if pairs == 1 else "pairs"
        typer.echo(f"{pairs} {noun} kept in {file}: stage.NAME.data={file} learns from them")


def _lines() -> Iterator[str]:
    """What is typed, or piped in, until it ends or /quit."""
    while True:
        typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            typer.echo("")
            return
        if line.strip():
            yield line


def _answer(console: "Console", talk: "Talk", line: str) -> int:
    """One line of a conversation; how many pairs were kept."""
    word, _, argument = line.partition(" ")
    if not line.startswith("/"):
        _show(console, talk, talk.say(line))
        return 0
    if word in ("/better", "/use"):
        index = ascii_lowercase.find(argument.strip().lower()) if len(argument.strip()) == 1 else -1
        if not 0 <= index < len(talk.replies):
            letters = ", ".join(ascii_lowercase[: len(talk.replies)]) or "none yet"
            raise UsageError(f"there is no reply {argument.strip()[:20]!r}", f"the replies are: {letters}")
        if word == "/use":
            talk.take(index)
            return 0
        pairs = talk.better(index)
        typer.echo(
            f"kept: {pairs} {'pair' if pairs == 1 else 'pairs'}"
            if pairs
            else "nothing kept: there is no other reply that says something else"
        )
        return pairs
    if word == "/again":
        _show(console, talk, talk.other_replies())
    elif word == "/new":
        talk.forget()
    elif word == "/help":
        typer.echo(HELP)
    else:
        raise UsageError(f"there is no {word[:20]!r}", "/help lists what there is")
    return 0


def _show(console: "Console", talk: "Talk", rows: Sequence[dict[str, Any]]) -> None:
    from preftune.chat.columns import show

    heads = [f"{letter}: {name}" for letter, name in zip(ascii_lowercase, talk.policies, strict=False)]
    show(console, heads, [row["response"] for row in rows], [_note(row) for row in rows])


def _note(row: dict[str, Any]) -> str:
    """Score, gold and KL to the reference."""
    measures = (("score", row["score"]), ("gold", row.get("gold")))
    notes = [f"{name} {value:+.2f}" for name, value in measures if value is not None]
    notes += [f"KL {row['kl']:.2f} nats", f"{row['length']} tokens"]
    return ", ".join(notes + ([] if row["ended"] else ["cut at the limit"]))


def _names(session: "Session", words: Sequence[str]) -> list[str]:
    """The policies that are asked for; "all" is those that are trained, base first."""
    from preftune.measure.samples import check_policy

    policies = [name for name, stage in session.config.stage.items() if stage.trains_policy]
    every = [name for name in (BASE, *policies) if session.is_trained(name)]
    names = [name.removeprefix("policy_") for word in words for name in (every if word == "all" else [word])]
    names = list(dict.fromkeys(names))
    for name in names:
        check_policy(session, name)
    return names


def _contestants(session: "Session") -> list[str]:
    """What others are compared with, and the last policy that is trained."""
    policies = [name for name, stage in session.config.stage.items() if stage.trains_policy]
    trained = [name for name in policies if session.is_trained(name)]
    if not trained:
        return [BASE]
    first = next((name for name in trained if session.config.stage[name].imitates), trained[0])
    return list(dict.fromkeys([first, trained[-1]]))
