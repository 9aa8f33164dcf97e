#!/usr/bin/env python3
"""A worker by itself: one rank of an engine, on this host. `serve.py` starts the same process.

launch/worker.py --scheduler tcp://10.0.0.1:7700 --curve-keys peer.keys --rank 1
torchrun --nproc-per-node 2 launch/worker.py --scheduler tcp://10.0.0.1:7700 --curve-keys peer.keys
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

try:
    from quire.common.errors import ConfigError
    from quire.launch.arguments import Parser, add_option, chosen
    from quire.launch.component import add_keys, add_lifeline, add_scheduler, importing, peer_keys, run, told
    from quire.launch.options import BY_NAME
except ModuleNotFoundError as error:
    if error.name != "quire":
        raise
    sys.exit("quire is not installed in this Python: run `pip install -e .` in the folder above this script")

DESCRIPTION = """\
One rank of a Quire engine: weights, KV cache and sampling. All options of the engine come from the scheduler.
--rank may be left to torchrun (RANK)."""
DEVICE = dataclasses.replace(
    BY_NAME["device"], default=None, description="Where to compute. By default what the scheduler was told."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 after a clean end, EXIT_CONFIG when the model cannot be served, EXIT_FATAL after a fault."""
    parser = Parser("worker.py", DESCRIPTION, __doc__.partition("\n\n")[2])
    add_scheduler(parser)
    parser.add_argument("--rank", metavar="N", help="Rank of this worker, from 0. Default: $RANK, else 0.")
    add_option(parser, DEVICE)
    add_keys(parser, "peer.keys")
    add_lifeline(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        rank = _rank("RANK", os.environ.get("RANK", "0")) if values.rank is None else _rank("--rank", values.rank)
        device, log_level = chosen(values, DEVICE), chosen(values, BY_NAME["log_level"])
        keys = peer_keys(values)
    except ConfigError as error:
        return told(error)

    def act() -> int:
        # Read when torch loads. Threads that spin while they wait for each other fight with everything else on the host
        # for its cores. Two threads on two cores decode 32 rows of the built-in model at so many tokens/s, the cores
        # being idle or shared with two busy processes: 3,280 or 57 spinning for long, 2,070 or 1,109 sleeping at once,
        # 2,454 or 1,328 after a thousand spins.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

        with importing():
            from quire.worker.process import main as worker  # noqa: PLC0415 (after the lifeline is held: torch takes seconds)

        return worker(scheduler=values.scheduler, rank=rank, device=device, keys=keys)

    return run(f"worker {rank}", f"quire-worker-{rank}", act, lifeline=values.lifeline, log_level=log_level)


def _rank(source: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{source}: expected a whole number from 0 on, got {text!r:.80}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
