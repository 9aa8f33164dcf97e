#!/usr/bin/env python3
"""A scheduler by itself. Workers and frontends connect to it and get their options from it. `serve.py` starts the same process.

launch/scheduler.py --model demo --tp 2
launch/scheduler.py --model demo --tp 2 --listen tcp://10.0.0.1:7700 --curve-keys scheduler.keys
"""

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from quire.common.errors import ConfigError
    from quire.launch.arguments import SOURCES, Parser, add_options, configuration, printable
    from quire.launch.checks import check_model
    from quire.launch.component import ADDRESS, add_keys, add_lifeline, importing, run, scheduler_keys, told
    from quire.launch.run_directory import run_directory
except ModuleNotFoundError as error:
    if error.name != "quire":
        raise
    sys.exit("quire is not installed in this Python: run `pip install -e .` in the folder above this script")

DESCRIPTION = "Decides which requests of a Quire engine run, step by step. Its options are those of the whole engine."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 after a clean end, EXIT_CONFIG when the configuration cannot be served, EXIT_FATAL after a fault."""
    parser = Parser("scheduler.py", DESCRIPTION, __doc__.partition("\n\n")[2] + "\n" + SOURCES)
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        default=ADDRESS,
        help=f"tcp://HOST:PORT; the workers use PORT + 1. Default: {ADDRESS}.",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        type=Path,
        help="Folder for sockets and other files of this run. Default: a new one.",
    )
    add_keys(parser, "scheduler.keys")
    add_lifeline(parser)
    add_options(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        config = configuration(values)
        if values.print_config:
            print(printable(config), end="")
            return 0
        keys = scheduler_keys(values)
    except ConfigError as error:
        return told(error)

    def act() -> int:
        with importing():
            from quire.launch.claim import claimed  # noqa: PLC0415 (after the lifeline is held)
            from quire.scheduler.process import main as scheduler  # noqa: PLC0415 (as above)

        info = check_model(config.model)
        supervised = values.lifeline is not None
        with claimed(values.listen), run_directory(values.run_dir) as run_dir:
            return scheduler(config, info, address=values.listen, run_dir=run_dir, supervised=supervised, keys=keys)

    return run("scheduler", "quire-scheduler", act, lifeline=values.lifeline, log_level=config.server.log_level)


if __name__ == "__main__":
    sys.exit(main())
