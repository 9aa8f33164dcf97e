"""`quire serve` with a scheduler and workers that fail where they are asked to: faulty_engine.py FLAGS OF serve.py."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.launch import serve, supervisor
from quire.launch.children import Child


def main() -> int:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as launch/worker.py has it; the faulty one loads torch earlier
    real = supervisor.engine

    def engine(*arguments: Any) -> Sequence[Child]:
        return [dataclasses.replace(child, module=f"faulty_{child.role}") for child in real(*arguments)]

    supervisor.engine = engine
    return serve.main()


if __name__ == "__main__":
    sys.exit(main())
