"""`preftune export RUN MODEL`: the command's options and what each does. Nothing goes anywhere unasked."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preftune.errors import InputMissing, StorageError, UsageError
from preftune.untrusted import printable

if TYPE_CHECKING:
    from preftune.export.model import Model

MB = 1e6


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A stage, or the name of its directory.")],
    gguf: Annotated[
        str | None, typer.Option(metavar="FILE", help="Have llama.cpp's converter write this file.")
    ] = None,
    kind: Annotated[str, typer.Option("--type", help="Numbers of that file: f32, f16, bf16, q8_0.")] = "f16",
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="List what would go to the hub, ask, and upload it."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Not private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Say how others read a finished model: lm-eval and RewardBench commands; GGUF; upload to the hub."""
    from preftune.export.model import find, harness_commands, to_gguf

    exported = find(run, model)
    typer.echo(printable(f"{exported.name}: {exported.directory}, a plain Hugging Face directory"))
    for install, command in harness_commands(exported):
        typer.echo(printable(f"\n{install}\n{command}"))
    if gguf is not None:
        to_gguf(exported, Path(gguf), kind)
        typer.echo(printable(f"\nwritten: {gguf} ({Path(gguf).stat().st_size / MB:.1f} MB)"))
    if push is not None:
        _push(exported, push, private=not public, ask=not yes)


def _push(model: "Model", repository: str, *, private: bool, ask: bool) -> None:
    """Everything is said before anything is sent; without a yes nothing is."""
    from preftune.export.model import what_goes_up

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"--push {repository}: no name of the hub", "OWNER/NAME")
    upload = what_goes_up(model)
    total = sum(upload.files.values())
    destination = f"{repository} ({'private' if private else 'PUBLIC: everybody can read it'})"
    typer.echo(printable(f"\nto {destination}: {len(upload.files)} files, {total / MB:.1f} MB"))
    for name, size in upload.files.items():
        typer.echo(printable(f"  {size / MB:10.3f} MB  {name}"))
    for name in upload.staying:
        typer.echo(printable(f"  stays here     {name}"))
    for warning in upload.warnings:
        typer.echo(printable(f"  look at this   {warning}"))
    if ask:
        typer.echo("upload? type yes: ", nl=False)
        if sys.stdin.readline().strip().lower() != "yes":
            typer.echo("nothing was sent")
            return
    typer.echo(printable(f"uploaded: {_send(model, repository, list(upload.files), private)}"))


def _send(model: "Model", repository: str, files: list[str], private: bool) -> str:
    from huggingface_hub import HfApi

    hub: Any = HfApi()
    with _refusals():
        hub.create_repo(repository, private=private, exist_ok=True)
        is_private = hub.repo_info(repository).private
    if is_private != private:
        raise UsageError(
            f"{repository} is there already, and {'private' if is_private else 'public'}: nothing was sent",
            f"another name, or {'without ' if is_private else ''}--public",
        )
    with _refusals():
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=model.directory,
            allow_patterns=files,
            commit_message=f"{model.name}, trained with preftune",
        )
    return str(getattr(commit, "commit_url", commit))


@contextmanager
def _refusals() -> Iterator[None]:
    """InputMissing without a token of the hub, StorageError for all else that goes wrong there."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputMissing("not logged in to the hub", "hf auth login, or set HF_TOKEN") from error
    except (HfHubHTTPError, HFValidationError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise StorageError(f"the hub refused: {first}", "check name and rights") from error
    except Exception as error:  # the client and what it is built on raise what they like
        raise StorageError(
            f"cannot reach the hub: {type(error).__name__}: {error}", "check the network, then try again"
        ) from error
