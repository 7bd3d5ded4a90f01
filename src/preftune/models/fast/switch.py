"""A fast path that can be left for a while: the plain one is what it is compared with."""

import contextlib
from collections.abc import Iterator


class Switch:
    """Whether a fast path is off."""

    def __init__(self) -> None:
        self.off = False

    @contextlib.contextmanager
    def turned_off(self) -> Iterator[None]:
        """Off within `with`, also where it was off before."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before
