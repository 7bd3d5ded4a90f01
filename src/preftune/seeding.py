"""One rule for every seed in preftune: hash what the random numbers are for."""

import hashlib
import json

Part = int | str | float | bool | None | tuple["Part", ...] | list["Part"]


def derive_seed(*parts: Part) -> int:
    """A 63-bit seed that depends on every part and on nothing else.

    Name what is drawn: `derive_seed(run_seed, stage, step, "sampling", row)`. Parts are written as JSON
    first, so that ("a", "bc") and ("ab", "c"), or 1 and "1", give unrelated seeds. The same on every machine
    and Python version.
    """
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
