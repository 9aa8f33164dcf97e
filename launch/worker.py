#!/usr/bin/env python3
"""A worker by itself: one rank of an engine, on this host. `serve.py` starts the same process.

launch/worker.py --scheduler tcp://10.0.0.1:7700 --rank 1
torchrun --nproc-per-node 2 launch/worker.py --scheduler tcp://10.0.0.1:7700
"""

import os
import sys
from collections.abc import Sequence

try:
    from quire.common.errors import ConfigError
    from quire.launch.arguments import Parser
    from quire.launch.component import add_lifeline, add_scheduler, run, told
except ModuleNotFoundError as error:
    if error.name != "quire":
        raise
    sys.exit("quire is not installed in this Python: run `pip install -e .` in the folder above this script")

DESCRIPTION = """\
One rank of a Quire engine: weights, KV cache and sampling. All options of the engine come from the scheduler.
--rank may be left to torchrun (RANK)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 after a clean end, EXIT_CONFIG when the model cannot be served, EXIT_FATAL after a fault."""
    parser = Parser("worker.py", DESCRIPTION, __doc__.partition("\n\n")[2])
    add_scheduler(parser)
    parser.add_argument("--rank", metavar="N", type=int, help="Rank of this worker, from 0. Default: $RANK, else 0.")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="Where to compute. Default: what the scheduler was told."
    )
    add_lifeline(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        rank = _rank(os.environ.get("RANK", "0")) if values.rank is None else values.rank
    except ConfigError as error:
        return told(error)

    def act() -> int:
        # Read when torch loads. Threads that spin while they wait fight with everything else on the host for its
        # cores: two threads on two busy cores decoded 32 rows at 277 tokens/s spinning, at 2,117 sleeping.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

        from quire.worker.process import main as worker  # noqa: PLC0415 (after the lifeline is held: torch takes seconds)

        return worker(
            scheduler=values.scheduler, rank=rank, device=values.device, supervised=values.lifeline is not None
        )

    return run(f"worker {rank}", f"quire-worker-{rank}", act, lifeline=values.lifeline, log_level=values.log_level)


def _rank(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"RANK: expected a whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
