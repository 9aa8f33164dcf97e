"""Standard streams that are closed, full or read by nobody: an engine serves on without them."""

import contextlib
import os
import sys
from typing import TextIO


def stand_in() -> None:
    """Open what is closed of descriptors 0 to 2, or the next socket would be this process' stderr, and its children's."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, descriptor)  # itself, when it is the first that is free; children inherit it then
            os.set_inheritable(descriptor, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 (as long as we live)


def say(text: str, stream: TextIO) -> None:
    """For people."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)
