"""`preftune label RUN`: the command's options and what each does."""

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preftune.errors import BackendMissing, UsageError
from preftune.untrusted import printable

if TYPE_CHECKING:
    from preftune.label.store import Store


def label(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="A stage that collected replies, or two policies A,B; by default SFT and the last."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--set", help="Name of the set; by default after its source.")
    ] = None,
    rater: Annotated[
        list[str] | None, typer.Option(help="Who judges, each with a link; may be repeated.")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Share of items that every rater judges (1); others go to one rater each."),
    ] = None,
    repeats: Annotated[
        float | None, typer.Option(help="Share of items that a rater sees twice (0.05).")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="A reason that raters may tick; may be repeated.")
    ] = None,
    informative: Annotated[
        bool | None,
        typer.Option(
            "--informative",
            help="The reward model's smallest margins first; of an ensemble, where it disagrees.",
        ),
    ] = None,
    all_pairs: Annotated[
        bool | None, typer.Option("--all-pairs", help="Every pair of a prompt's replies instead of one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many items.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, sides, overlap and repeats (0).")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8321,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the page as a file for one --rater without Python."),
    ] = None,
    take: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="FILE", help="Add what a rater saved from such a file."),
    ] = None,
    results: Annotated[bool, typer.Option("--results", help="Show what the judgements say so far.")] = False,
    export: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the preferences in TRL's form, for data.name.")
    ] = None,
) -> None:
    """Have people judge replies on a local page: blind, side by side. Resumes; results at any time."""
    from preftune.label.store import Store, begin, find_set
    from preftune.rundir import RunDir
    from preftune.sums import refuse_links

    refuse_links(RunDir(run))
    rater = list(dict.fromkeys(rater or ()))
    folder, origin = find_set(RunDir(run), name, source)
    settings = {
        "seed": seed,
        "overlap": overlap,
        "repeats": repeats,
        "informative": informative,
        "limit": limit,
    }
    settings |= {
        "all_pairs": all_pairs,
        "tags": list(tag) if tag else None,
        "raters": rater or None,
    }
    if results or export:
        if html or take or any(value is not None for value in settings.values()):
            raise UsageError(
                "--results and --export show what was judged, and change nothing",
                "import, and add raters, in a command of their own before",
            )
        _show(Store(folder), results, export)
        return
    from preftune.runs.lock import held

    with held(RunDir(folder)):
        store = begin(folder, origin, settings)
        if html is not None:
            _write_page(store, rater, html)
        for file in take or ():
            _import(store, file)
        if html is None and not take:
            _serve(store, port)


def _show(store: "Store", results: bool, export: str | None) -> None:
    from preftune.label.export import export as write
    from preftune.label.results import as_rows

    if results:
        table = as_rows(store)
        typer.echo(f"{table['set']}: {table['items']:,} items")
        for words, value, n, kind in table["rows"]:
            typer.echo(f"  {words}: {value}  (n = {n}; {kind})")
        for who, progress, agreement in table["raters"]:
            typer.echo(printable(f"  {who}: {progress}, {agreement}"))
        for note in table["notes"]:
            typer.echo(note)
    if export is not None:
        exported = write(store, Path(export))
        typer.echo(
            f"{export}: {exported.pairs:,} pairs, {exported.corrected:,} of them with a rater's own reply"
        )
        typer.echo(f"{exported.without:,} judged items gave none (ties, both bad, raters who disagree)")


def _write_page(store: "Store", raters: list[str], file: str) -> None:
    from preftune.label.page import write_file

    names = raters or store.design.raters
    if len(names) != 1:
        raise UsageError("a file is for one rater", "say which: --rater NAME")
    write_file(store, names[0], Path(file))
    typer.echo(
        f"{file}: send it to {names[0]}; what comes back: "
        f"preftune label RUN --set {store.folder.name} --import FILE"
    )


def _import(store: "Store", file: str) -> None:
    from preftune.label.export import take

    imported = take(store, Path(file))
    typer.echo(f"{file}: {imported.new:,} new judgements, {imported.before:,} known before")


def _serve(store: "Store", port: int) -> None:
    try:
        from preftune.label.server import make_app, serve
    except ImportError as error:
        missing = f"{error.name} is not installed, which the page needs"
        raise BackendMissing(
            missing, "pip install 'preftune[label]', or write a file with --html FILE"
        ) from None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} cannot be used: {error}", "choose another with --port N") from None
        port = probe.getsockname()[1]  # of 0 the one that was free
    tokens = store.tokens()
    typer.echo(f"{store.folder}: {len(store.items):,} items. Only this machine can open these links:")
    for name, token in tokens.items():
        typer.echo(
            f"  {name or 'results (yours; raters should not see them)'}: http://127.0.0.1:{port}/#{token}"
        )
    typer.echo("Ctrl-C ends it; the same command continues.")
    serve(make_app(store, tokens, port), port)
