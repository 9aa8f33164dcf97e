#!/usr/bin/env python3
"""A frontend by itself: HTTP for an engine whose scheduler runs elsewhere. `serve.py` starts the same process.

launch/frontend.py --scheduler tcp://10.0.0.1:7700 --host 127.0.0.1 --port 8000
"""

import socket
import sys
from collections.abc import Sequence

try:
    from quire.common.errors import ConfigError
    from quire.launch.arguments import Parser
    from quire.launch.component import add_lifeline, add_scheduler, run, told
    from quire.launch.listen import listen
except ModuleNotFoundError as error:
    if error.name != "quire":
        raise
    sys.exit("quire is not installed in this Python: run `pip install -e .` in the folder above this script")

DESCRIPTION = "The HTTP side of a Quire engine: text in, tokens to the scheduler, text out. All other options come from the scheduler."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 after a clean end, EXIT_CONFIG when the model cannot be served, EXIT_FATAL after a fault."""
    parser = Parser("frontend.py", DESCRIPTION, __doc__.partition("\n\n")[2])
    add_scheduler(parser)
    parser.add_argument("--host", metavar="HOST", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument(
        "--port", metavar="PORT", type=int, default=8000, help="Port to listen on; 0 picks a free one. Default: 8000."
    )
    parser.add_argument(
        "--fd", metavar="FD", type=int, help="A listening socket that was inherited, in place of --host and --port."
    )
    add_lifeline(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        sock = listen(values.host, values.port) if values.fd is None else socket.socket(fileno=values.fd)
    except ConfigError as error:
        return told(error)

    def act() -> int:
        from quire.frontend.process import main as frontend  # noqa: PLC0415 (after the lifeline is held)

        return frontend(
            scheduler=values.scheduler, sock=sock, supervised=values.lifeline is not None, log_level=values.log_level
        )

    return run("frontend", "quire-frontend", act, lifeline=values.lifeline, log_level=values.log_level)


if __name__ == "__main__":
    sys.exit(main())
