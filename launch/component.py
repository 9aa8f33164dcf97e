"""What the three component scripts share: flags of every component, and the frame that turns an outcome into an exit code."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable

from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError
from ..common.log import configure
from ..common.process import END, die_with_parent, set_title
from .arguments import add_option
from .options import BY_NAME

log = logging.getLogger(__name__)

ADDRESS = "tcp://127.0.0.1:7700"  # of a scheduler started by hand; PORT + 1 is the workers' wire


def add_lifeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lifeline", metavar="FD", type=int, help="Set by serve.py: a pipe whose end of file ends this process."
    )


def add_scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", default=ADDRESS, help=f"Where the scheduler listens. Default: {ADDRESS}."
    )
    add_option(parser, BY_NAME["log_level"])


def run(label: str, title: str, act: Callable[[], int], *, lifeline: int | None, log_level: str) -> int:
    """`act` as the body of this process; returns its exit code.

    An import that fails must happen inside `act`: the interpreter's own exit code for an exception is 1, which
    here says that the configuration is at fault.
    """
    die_with_parent(lifeline)
    set_title(title)
    configure(label, log_level)
    try:
        return act()
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        log.exception("a fault of Quire's: %r", error)
        return EXIT_FATAL
    finally:
        for signum in (signal.SIGTERM, END):
            signal.signal(signum, signal.SIG_IGN)  # it ends already: a handler has nothing left to act on


def told(error: ConfigError) -> int:
    """A mistake on the command line: one line on stderr, no traceback."""
    print(f"error: {error}", file=sys.stderr)
    return EXIT_CONFIG
