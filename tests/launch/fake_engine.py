"""A supervisor of fake processes: `fake_engine.py FRONTEND DOWNLOAD SCHEDULER WORKER`, each a behaviour of fake_child.py.

The environment's MAX_RESTARTS, STALL_TIMEOUT and DRAIN_TIMEOUT are the options of these names.
"""

import os
import sys
from pathlib import Path

from quire.common.config import EngineConfig, RecoveryConfig, ServerConfig
from quire.common.log import configure
from quire.launch.children import Child, Role, address_of
from quire.launch.listen import listen
from quire.launch.run_directory import run_directory
from quire.launch.signals import Signals
from quire.launch.supervisor import Plan, supervise


def main() -> int:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    configure("supervisor")
    max_restarts, stall_timeout = (
        int(os.environ.get("MAX_RESTARTS", "10")),
        float(os.environ.get("STALL_TIMEOUT", "30")),
    )
    config = EngineConfig(
        server=ServerConfig(port=0, drain_timeout=float(os.environ.get("DRAIN_TIMEOUT", "1"))),
        recovery=RecoveryConfig(max_restarts=max_restarts, stall_timeout=stall_timeout),
    )
    with listen("127.0.0.1", 0) as sock, run_directory() as run_dir, Signals() as signals:
        sys.stdout.write(f"{run_dir}\n")
        sys.stdout.flush()

        def child(role: Role, behaviour: str) -> list[Child]:
            if behaviour == "none":
                return []
            return [Child(role, f"the {role}", "fake_child", (behaviour, address_of(run_dir)), (sock.fileno(),))]

        frontend, download, scheduler, worker = sys.argv[1:5]
        plan = Plan(
            child("frontend", frontend),
            child("download", download),
            lambda: [*child("scheduler", scheduler), *child("worker", worker)],
        )
        return supervise(plan, config, run_dir, sock, signals)


if __name__ == "__main__":
    sys.exit(main())
