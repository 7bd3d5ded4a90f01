"""One commit of a hub repository, in the local cache: an id is resolved once, and only files that are asked
for are fetched. No request may hang: each is given seconds, but for weights and data, and none is repeated
without end.

What a commit holds is written down beside the cache of preftune, so that a later look needs no network.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.data.readme import README
from preftune.errors import DataError, InputMissing, PermissionMissing, StorageError
from preftune.rundir import read_json, read_object, write_json
from preftune.untrusted import printable

PROBE_SECONDS = 2.5
ASK_SECONDS = 10.0  # for what a repository holds
SMALL_SECONDS = 60.0  # for a file that is neither weights nor data: those take as long as they take
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREADABLE = (InputMissing, PermissionMissing, DataError, KeyError, TypeError)  # a list that is not there
Kind = Literal["model", "dataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A commit of a repository: `files` are all of it, of which the cache may hold some. `partial`: they are
    those in the cache, and nobody knows whether there are more.
    """

    name: str
    kind: Kind
    commit: str
    files: tuple[str, ...]
    partial: bool = False

    @property
    def path(self) -> Path:
        """Where the cache keeps this commit."""
        return _folder(self.name, self.kind) / "snapshots" / self.commit

    def fetch(self, files: Iterable[str]) -> Path:
        """Bring these files into the cache, where they are not there yet; returns `path`."""
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing and (variable := offline_asked_for()):
            raise InputMissing(
                f"{self.kind} {self.name!r}: the cache lacks {', '.join(missing[:3])} of commit "
                f"{self.commit[:12]}, and {variable} is set",
                "run once with the network, or give a local directory",
            )
        for file in missing:
            self._fetch(file)
        return self.path

    def _fetch(self, file: str) -> None:
        from huggingface_hub import hf_hub_download

        def download() -> str:
            return hf_hub_download(
                self.name, file, repo_type=self.kind, revision=self.commit, etag_timeout=ASK_SECONDS
            )

        large = file != README if self.kind == "dataset" else file.lower().endswith(".safetensors")
        subject = f"{self.kind} {self.name!r}, file {file}"
        _answer(download, subject, self.name, None if large else SMALL_SECONDS)


def resolve(name: str, kind: Kind, commit: str | None = None, alternatives: str = "") -> Snapshot:
    """A hub id as one commit: `commit` where a run has recorded one, else what `main` is now, else, where the
    hub is out of reach, what `main` was when it was last looked at.

    A known commit whose list of files is known asks nothing of the network. InputMissing names the status
    and what to do.
    """
    if commit is not None and (listed := _listed_commit(name, kind, commit)) is not None:
        return listed
    try:
        if variable := offline_asked_for():
            raise InputMissing(f"{kind} {name!r} is not in the local cache, and {variable} is set")
        return _looked_up(name, kind, commit)
    except (InputMissing, DataError) as error:
        last = commit or _last(name, kind)
        cached = None if last is None else _listed_commit(name, kind, last) or _on_disk(name, kind, last)
        if cached is None:
            error.hint = "; ".join(filter(None, (error.hint, alternatives)))
            raise
        if not offline_asked_for():  # (offline is what was asked for)
            warn(f"{error.message}; going on with commit {cached.commit[:12]} from the cache")
        return cached


def warn(message: str) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)


def _looked_up(name: str, kind: Kind, commit: str | None) -> Snapshot:
    from huggingface_hub import HfApi

    if not reachable():
        raise InputMissing(f"{kind} {name!r}: the hub cannot be reached ({endpoint()})", _LATER)

    def ask() -> Any:
        return HfApi().repo_info(name, repo_type=kind, revision=commit or "main", timeout=ASK_SECONDS)

    info = _answer(ask, f"{kind} {name!r}", name, ASK_SECONDS)
    sha, files = info.sha, [file.rfilename for file in info.siblings or ()]
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha) or any(map(_outside, files)):
        raise DataError(f"{kind} {name!r}: the hub's answer names no commit, or files outside of it")
    snapshot = Snapshot(name=name, kind=kind, commit=sha, files=tuple(sorted(files)))
    with suppress(PermissionMissing, StorageError):  # a cache that only others may write to
        write_json(_listing(name, kind, sha), {"files": list(snapshot.files)})
        if commit is None:
            write_json(_listing(name, kind, "main"), {"commit": sha})
    return snapshot


def _outside(file: str) -> bool:
    return file.startswith("/") or "\\" in file or ".." in file.split("/")


def _listed_commit(name: str, kind: Kind, commit: str) -> Snapshot | None:
    """A commit whose files have been listed before."""
    if not _COMMIT.fullmatch(commit):
        return None
    with suppress(*_UNREADABLE):
        files = read_json(_listing(name, kind, commit))["files"]
        if all(isinstance(file, str) and not _outside(file) for file in files):
            return Snapshot(name=name, kind=kind, commit=commit, files=tuple(files))
    return None


def _last(name: str, kind: Kind) -> str | None:
    """The commit that `main` was when preftune, or else another program, last looked."""
    with suppress(*_UNREADABLE):
        return str(read_json(_listing(name, kind, "main"))["commit"])
    with suppress(OSError, UnicodeDecodeError):
        return (_folder(name, kind) / "refs" / "main").read_text(encoding="ascii").strip()
    return None


def _on_disk(name: str, kind: Kind, commit: str) -> Snapshot | None:
    """A commit that another program has brought into the cache, with the files that are there."""
    if not _COMMIT.fullmatch(commit):
        return None
    root = _folder(name, kind) / "snapshots" / commit
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    if not files:
        return None
    return Snapshot(name=name, kind=kind, commit=commit, files=tuple(files), partial=True)


def _folder(name: str, kind: Kind) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _listing(name: str, kind: Kind, commit: str) -> Path:
    return _folder(name, kind) / "preftune" / f"{commit}.json"


def _answer(call: Callable[[], Any], subject: str, name: str, seconds: float | None) -> Any:
    """What `call` returns; an error for people if it raises, or takes longer than `seconds`."""
    results, errors = _within(seconds, call)
    if results:
        return results[0]
    if errors and not (seconds and "Timeout" in type(errors[0]).__name__):  # the client's own, as long
        raise _explained(errors[0], subject, name) from errors[0]
    raise InputMissing(
        f"{subject}: the hub ({endpoint()}) does not answer within {seconds:g} seconds", _LATER
    )


def _within(seconds: float | None, call: Callable[[], Any]) -> tuple[list[Any], list[Exception]]:
    """What `call` has returned by then, or what it has raised; both are empty where it has done neither.

    In a thread, because neither name resolution nor an answer that drips knows a timeout.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # the client and what it is built on raise what they like
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results, errors


_LATER = "try again later"
_TOKEN = "a token goes into the variable HF_TOKEN, or is stored by `hf auth login`"


def _explained(error: Exception, subject: str, name: str) -> InputMissing:
    """The client's error as one for people, its status kept."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    answered = f"the hub answered {status}" if status else "the hub cannot be reached"
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, errors.GatedRepoError):
            return InputMissing(
                f"{subject} is gated: {answered}",
                f"accept its conditions at {endpoint()}/{name} with your account; {_TOKEN}",
            )
        if isinstance(link, errors.RepositoryNotFoundError):
            return InputMissing(
                f"{subject}: there is no such repository, or it is private ({answered})",
                f"check the name, owner/name; for a private one, {_TOKEN}",
            )
        if isinstance(link, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
            return InputMissing(f"{subject}: this commit or file is not there any more ({answered})", _LATER)
        status = status or getattr(getattr(link, "response", None), "status_code", None)
        link = link.__cause__ or link.__context__
    answered = f"the hub answered {status}" if status else "the hub cannot be reached"
    if status in (401, 403):
        return InputMissing(f"{subject}: {answered}, access is denied", _TOKEN)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    words = f"{answered} ({endpoint()})" if status is None else answered
    return InputMissing(f"{subject}: {words}: {type(error).__name__}: {first}", _LATER)


def reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Whether the hub's endpoint answers anything at all."""
    from huggingface_hub import get_session

    answers, _ = _within(seconds + 0.5, lambda: get_session().head(endpoint(), timeout=seconds))
    return bool(answers)


def offline_asked_for() -> str:
    """The variable of the libraries that says to stay off the network; "" if none does."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    set_names = (name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"})
    return next(set_names, names[0] if constants.HF_HUB_OFFLINE else "")


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def safetensors_fault(file: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size alone; "" if nothing is."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            return "its header is cut off or is none"
        try:
            header = json.loads(stream.read(length))
            ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header cannot be read"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"it has {size} bytes instead of {expected}"


def shards(path: Path) -> Sequence[str]:
    """The files that an index names; () where there is none."""
    index = path / "model.safetensors.index.json"
    names = read_object(index).get("weight_map", {}) if index.is_file() else {}
    return sorted({str(file) for file in names.values()}) if isinstance(names, dict) else ()
