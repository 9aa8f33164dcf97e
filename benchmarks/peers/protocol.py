"""What a measured engine says: one JSON object a line.

It begins with {"load_s", "version"}, then answers each {"prompts": [[id, ...], ...], "output": n} with {"seconds", "tokens"}, until its
stdin ends. Whatever else the engine prints goes to stderr. Only the standard library: any engine's Python runs this.
"""

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], int]  # prompts and the tokens wanted of each; how many tokens came out


def answer(load: Callable[[], tuple[Generate, str]]) -> None:
    """Load, then measure until there is nothing more to do. `load` also tells the version."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    generate, version = load()
    print(json.dumps({"load_s": time.perf_counter() - start, "version": version}), file=out)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        tokens = generate(asked["prompts"], asked["output"])
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=out)
