#!/usr/bin/env python3
"""A frontend by itself: HTTP for an engine whose scheduler runs elsewhere. `serve.py` starts the same process.

launch/frontend.py --port 8000
launch/frontend.py --scheduler tcp://10.0.0.1:7700 --curve-keys peer.keys --host 127.0.0.1 --port 8000
"""

import logging
import sys
from collections.abc import Sequence

try:
    from quire.common.errors import ConfigError
    from quire.launch.arguments import Parser, add_option, chosen
    from quire.launch.component import add_keys, add_lifeline, add_scheduler, importing, peer_keys, run, told
    from quire.launch.listen import inherited, listen, url_of
    from quire.launch.options import BY_NAME
except ModuleNotFoundError as error:
    if error.name != "quire":
        raise
    sys.exit("quire is not installed in this Python: run `pip install -e .` in the folder above this script")

log = logging.getLogger("quire.launch.frontend")

DESCRIPTION = "The HTTP side of a Quire engine: text in, tokens to the scheduler, text out. All other options come from the scheduler."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 after a clean end, EXIT_CONFIG when the model cannot be served, EXIT_FATAL after a fault."""
    parser = Parser("frontend.py", DESCRIPTION, __doc__.partition("\n\n")[2])
    add_scheduler(parser)
    add_option(parser, BY_NAME["host"])
    add_option(parser, BY_NAME["port"])
    parser.add_argument(
        "--fd", metavar="FD", type=int, help="A listening socket that was inherited, in place of --host and --port."
    )
    add_keys(parser, "peer.keys")
    add_lifeline(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        log_level = chosen(values, BY_NAME["log_level"])
        host, port = chosen(values, BY_NAME["host"]), chosen(values, BY_NAME["port"])
        keys = peer_keys(values)
        sock = listen(host, port) if values.fd is None else inherited(values.fd)
    except ConfigError as error:
        return told(error)

    supervised = values.lifeline is not None

    def act() -> int:
        with importing():
            from quire.frontend.process import main as frontend  # noqa: PLC0415 (after the lifeline is held)

        if not supervised:  # else the supervisor says where, once it is of use
            log.info("listening on %s, waiting for the scheduler at %s", url_of(sock), values.scheduler)
        return frontend(scheduler=values.scheduler, sock=sock, supervised=supervised, log_level=log_level, keys=keys)

    return run("frontend", "quire-frontend", act, lifeline=values.lifeline, log_level=log_level)


if __name__ == "__main__":
    sys.exit(main())
