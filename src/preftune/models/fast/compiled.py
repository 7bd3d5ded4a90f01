"""The decoding kernel's library: where it lies and how it is compiled. No torch: a package is built with it.

python -m preftune.models.fast.compiled AVX2 AVX512        puts both beside native.cpp
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from preftune.errors import BackendMissing, PermissionMissing, PreftuneError, StorageError
from preftune.hashing import sha256_file

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = {  # by the processor's capability, in torch's words
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma", "-DWIDTH=16"],
    "AVX2": ["-mavx2", "-mfma", "-DWIDTH=8"],
}


def library(capability: str) -> Path:
    """Where the kernel for a processor's `capability`, in torch's words, lies if it is built."""
    version = sha256_file(SOURCE)[:12]
    return SOURCE.with_name(f"native-{capability.lower().replace(' ', '-')}-{version}.so")


def compile_kernel(capability: str, to: Path | None = None) -> Path:
    """Compile the kernel for `capability` into `to`; returns where it is.

    Raises BackendMissing without a compiler or for a processor it is not made for, PermissionMissing where
    the directory cannot be written, StorageError where the compiler fails.
    """
    target, compiler = to or library(capability), shutil.which("c++") or shutil.which("g++")
    if capability not in FLAGS:
        raise BackendMissing(
            f"no kernel for a processor with {capability}", "nothing to do: torch does the work"
        )
    if compiler is None:
        raise BackendMissing(
            "no C++ compiler (c++, g++) found", "install one, or continue without the kernel"
        )
    draft = target.with_suffix(".part")
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *FLAGS[capability]]
    try:
        draft.touch()
        command += [str(SOURCE), "-o", str(draft)]
        process = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        if process.returncode:
            raise StorageError(f"{compiler} failed:\n{process.stderr[:2000]}", "continue without the kernel")
        draft.replace(target)
    except OSError as error:
        raise PermissionMissing(
            f"{target}: {error.strerror}", "build where preftune may be written"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return target


def main(capabilities: Sequence[str]) -> None:
    """Build for these, as a command."""
    try:
        for name in capabilities:
            print(compile_kernel(name))
    except PreftuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main(sys.argv[1:])
