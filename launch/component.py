"""What the three component scripts share: flags of every component, and the frame that turns an outcome into an exit code."""

import argparse
import contextlib
import gc
import ipaddress
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError
from ..common.log import configure
from ..common.process import END, GONE, die_with_parent, on_termination, set_title
from .arguments import add_option
from .options import BY_NAME
from .streams import say

if TYPE_CHECKING:
    from ..common.curve import PeerKeys, SchedulerKeys

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


def add_keys(parser: argparse.ArgumentParser, file: str) -> None:
    """`file`: which of the two that `quire keys` makes."""
    parser.add_argument(
        "--curve-keys",
        metavar="FILE",
        type=Path,
        help=f"{file} of this engine, made by `quire keys DIR`: links are encrypted, and only who holds keys takes part.",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="Do without keys between hosts. Whoever reaches the scheduler's ports then takes part, and reads along.",
    )


def scheduler_keys(values: argparse.Namespace) -> "SchedulerKeys | None":
    """What the flags of `add_keys` say. Raises ConfigError for an address that other hosts reach when they say nothing."""
    if (file := _key_file(values, values.listen)) is None:
        return None
    from ..common.curve import read_scheduler_keys  # noqa: PLC0415 (most engines have one host)

    return read_scheduler_keys(file)


def peer_keys(values: argparse.Namespace) -> "PeerKeys | None":
    """As `scheduler_keys`, of a worker or a frontend."""
    if (file := _key_file(values, values.scheduler)) is None:
        return None
    from ..common.curve import read_peer_keys  # noqa: PLC0415 (as above)

    return read_peer_keys(file)


def _key_file(values: argparse.Namespace, address: str) -> Path | None:
    file: Path | None = values.curve_keys
    if file is not None and values.insecure:
        raise ConfigError("--curve-keys and --insecure exclude each other: links are encrypted or they are not")
    if file is not None or is_local(address):
        return file
    if not values.insecure:
        raise ConfigError(
            f"{address}: other hosts reach this address. Make keys with `quire keys DIR` and name them with --curve-keys,"
            " or say --insecure where everybody on the network is to be trusted"
        )
    say(f"warning: --insecure: whoever reaches {address} takes part in this engine, and reads along", sys.stderr)
    return None


def is_local(address: str) -> bool:
    """Whether only processes of this host reach it."""
    scheme, _, rest = address.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return scheme == "ipc" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(label: str, title: str, act: Callable[[], int], *, lifeline: int | None, log_level: str) -> int:
    """`act` as the body of this process; returns its exit code.

    Who is asked to end before `act` has said how ends with 0: its imports take seconds.
    An import that fails must happen inside `act`: the interpreter's own exit code for an exception is 1, which
    here says that the configuration is at fault.
    """
    die_with_parent(lifeline)
    set_title(title)
    configure(label, log_level)
    on_termination(lambda: sys.exit(0), supervised=lifeline is not None)
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
        for signum in (signal.SIGTERM, END, GONE):
            signal.signal(signum, signal.SIG_IGN)  # it ends already: a handler has nothing left to act on


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of a process's life: no collection looks through what they make, neither meanwhile (eight imports of
    torch took 8.1 s of processor time with it, 6.0 without) nor in the middle of a step nor at the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def told(error: ConfigError) -> int:
    """A mistake on the command line: one line on stderr, no traceback."""
    print(f"error: {error}", file=sys.stderr)
    return EXIT_CONFIG
