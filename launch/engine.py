"""What the commands that look into a running engine share: where its scheduler is, and a conversation with it."""

import argparse
import contextlib
import time
from collections.abc import Iterator

from ..common.errors import ConfigError, EngineError
from ..common.messages import Message
from .children import address_of
from .component import ADDRESS, add_keys, peer_keys
from .observer import Observer
from .run_directory import living

ANSWER_S = 10.0


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help=f"Where the scheduler listens. Default: the engine that runs on this machine, else {ADDRESS}.",
    )
    add_keys(parser, "peer.keys")


@contextlib.contextmanager
def engine(values: argparse.Namespace, role: str) -> Iterator[Observer]:
    """An observer of the engine that the flags of `add_engine` name, welcomed. Raises ConfigError when there is none."""
    values.scheduler = values.scheduler or _found()
    with contextlib.closing(Observer(values.scheduler, role, peer_keys(values))) as observer:
        deadline = time.monotonic() + ANSWER_S
        while observer.welcome is None:
            heard(observer)
            if time.monotonic() > deadline:
                raise ConfigError(f"{values.scheduler}: no scheduler answers there; name another with --scheduler")
        yield observer


def heard(observer: Observer) -> list[Message]:
    """What comes within a moment."""
    observer.socket.poll(int(observer.wait_s * 1000))
    try:
        return observer.received()
    except EngineError as error:
        raise ConfigError(str(error)) from None


def _found() -> str:
    folders = living()
    if len(folders) > 1:
        names = ", ".join(map(address_of, folders))
        raise ConfigError(f"{len(folders)} engines run on this machine; say which one with --scheduler: {names}")
    return address_of(folders[0]) if folders else ADDRESS
