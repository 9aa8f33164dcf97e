"""`quire keys`: the keys that let the parts of an engine talk over a network."""

from collections.abc import Sequence
from pathlib import Path

from ..common.curve import make
from ..common.errors import ConfigError
from .arguments import Parser
from .component import told

DESCRIPTION = """\
Make the two key files of an engine whose parts run on several hosts. Its links are then encrypted, and only who holds
keys takes part. Make them anew for each engine; to lock out whoever has the old ones, make new ones and start again."""

MADE = """\
{scheduler}
    for the scheduler, on its host only:
    launch/scheduler.py --listen tcp://HOST:7700 --curve-keys {scheduler} ...
{peer}
    for workers and frontends; copy it to each of their hosts (scp -p keeps it readable by you alone):
    launch/worker.py   --scheduler tcp://HOST:7700 --curve-keys {peer} ...
    launch/frontend.py --scheduler tcp://HOST:7700 --curve-keys {peer} ...

HOST is an address of the scheduler's host. Who has {peer_name} may take part and read along: keep both files
to yourself. What the workers send each other (torch.distributed) is not encrypted by these keys: keep their network private."""


def main(argv: Sequence[str] | None = None, *, prog: str = "quire keys") -> int:
    """Exit code 0, or EXIT_CONFIG when the files cannot be written or are there already."""
    parser = Parser(prog, DESCRIPTION, f"{prog} ~/engine-keys", usage="DIR")
    parser.add_argument("directory", metavar="DIR", type=Path, help="Where the files go; made when it is not there.")
    try:
        values = parser.read(list(argv or ()))
        scheduler, peer = make(values.directory)
    except ConfigError as error:
        return told(error)
    print(MADE.format(scheduler=scheduler, peer=peer, peer_name=peer.name))
    return 0
