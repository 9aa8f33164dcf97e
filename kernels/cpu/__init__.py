"""Kernels for a CPU, in numba and oneDNN: the signatures of the references in `kernels/`.

Compiled code is kept in a folder that is named after the source of all of them and the CPU: numba itself looks only at the
file of the function that it compiles, and would keep what another file has changed.
"""

import hashlib
import os
from pathlib import Path

import llvmlite.binding
import numba

_HERE = Path(__file__).parent


def _name() -> str:
    source = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))
    cpu = f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    return hashlib.sha256(source + cpu.encode()).hexdigest()[:16]


def _folder() -> Path:
    beside = _HERE / "__pycache__"
    writable = os.access(beside, os.W_OK) if beside.exists() else os.access(_HERE, os.W_OK)
    return (beside if writable else Path.home() / ".cache" / "quire") / _name()


if not numba.config.CACHE_DIR:  # else it is its user's choice
    numba.config.CACHE_DIR = str(_folder())
