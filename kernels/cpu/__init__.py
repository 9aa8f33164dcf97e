"""Kernels for a CPU, in numba and oneDNN: the signatures of the references in `kernels/`.

Compiled code is kept in a folder that is named after the source of all of them: numba itself looks only at the file of
the function that it compiles, and would keep what another file has changed.
"""

import hashlib
import os
from pathlib import Path

import numba

_HERE = Path(__file__).parent
_SOURCE = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))

if os.access(_HERE, os.W_OK):  # else where numba puts such things for the user
    numba.config.CACHE_DIR = str(_HERE / "__pycache__" / hashlib.sha256(_SOURCE).hexdigest()[:16])
