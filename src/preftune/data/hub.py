"""Preference data from the Hugging Face hub, or from what `datasets` has cached of it.

The hub client retries with back-off for minutes when there is no network. A newcomer without one should know
within five seconds, so the endpoint is asked once, briefly, before `datasets` is.
"""

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from preftune.data.rows import OnBadRow, Tally
from preftune.data.splits import named_split
from preftune.errors import InputMissing

PROBE_SECONDS = 2.5
ALTERNATIVES = (
    "give local files: data.name=PATH (a directory, .jsonl, .jsonl.gz or .parquet file); "
    'or run the recipe quickstart (recipe="quickstart"), which needs no download'
)


def read_hub(
    name: str,
    data_dir: str | None,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
) -> list[Tally]:
    """Read every split of a hub data set such as Anthropic/hh-rlhf; `data_dir` becomes the source of its
    pairs.

    Raises InputMissing, within about 3 seconds where there is no network, if it can be had neither from the
    hub nor from the cache.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # to `datasets`, "csv" is a reader of local files
        raise InputMissing(f"{name}: no such path here, and no hub id (owner/name)", ALTERNATIVES)
    online = not offline_asked_for() and reachable()
    if not online and not _maybe_cached(name):
        raise InputMissing(
            f"{name}: no such path here, and the hub cannot be reached ({_endpoint()})", ALTERNATIVES
        )
    tallies = []
    for split, rows in _load(name, data_dir, online=online).items():
        where = f"{name}{f'/{data_dir}' if data_dir else ''}[{split}]"
        tally = Tally(
            name=where,
            split=named_split(split) or "train",
            source=data_dir or "",
            on_bad_row=on_bad_row,
            columns=columns or {},
        )
        for number, record in enumerate(_records(rows), 1):
            tally.take(record, f"{where}: row {number}")
        tally.finish()
        tallies.append(tally)
    return tallies


def reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Whether the hub's endpoint answers. In a thread, because name resolution knows no timeout."""
    answers: list[int] = []

    def ask() -> None:
        from huggingface_hub import get_session

        with suppress(Exception):  # whatever goes wrong, the answer is no
            answers.append(get_session().head(_endpoint(), timeout=seconds).status_code)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return bool(answers) and answers[0] < 500


def _load(name: str, data_dir: str | None, *, online: bool) -> dict[str, Any]:
    import datasets  # takes seconds to import

    try:
        with nullcontext() if online else _offline(datasets):
            loaded = datasets.load_dataset(name, data_dir=data_dir)
            return {str(split): rows for split, rows in loaded.items()}
    except Exception as error:  # the library raises many kinds, from five other libraries
        first = (str(error).splitlines() or [""])[0]
        where = f"{name}{f' (data_dir={data_dir})' if data_dir else ''}"
        raise InputMissing(
            f"{where}: cannot be loaded: {type(error).__name__}: {first}", ALTERNATIVES
        ) from error


def _records(rows: Any) -> Iterator[dict[str, Any]]:
    """Plain records of a `datasets.Dataset`, in batches: row by row takes ten times as long."""
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Keep `datasets` and the hub client from the network, so that they go to the cache without retries."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def offline_asked_for() -> bool:
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return constants.HF_HUB_OFFLINE or any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _maybe_cached(name: str) -> bool:
    """Whether the cache of `datasets` holds anything of this owner, without importing the library."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")).expanduser()
    owner, _, rest = name.rpartition("/")
    return any(cache.glob(f"{owner}___*" if owner else f"{rest}*"))
