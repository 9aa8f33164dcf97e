"""`quire bench`: the programs of benchmarks/, by name.

quire bench              lists them
quire bench serve --help
"""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import ConfigError
from .component import told
from .options import nearest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


def main(argv: Sequence[str], prog: str = "quire bench") -> int:
    """Becomes the program that is named, with what stands behind its name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} NAME [OPTION ...]\n")
        print("\n".join(f"  {name:<10} {line}" for name, line in programs().items()))
        print(f"\n`{prog} NAME --help` tells all about one.")
        return 0
    name, *rest = argv
    found = programs()
    if name not in found:
        return told(ConfigError(f"there is no benchmark {name!r}.{nearest(name, found)} (see {prog})"))
    path = FOLDER / f"{name}.py"
    if "quire.tests" in path.read_text(encoding="utf-8") and not (ROOT / "tests").is_dir():
        return told(ConfigError(f"{name} uses the clients of tests/: run it in a checkout, where they are"))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *rest])  # as `python benchmarks/NAME.py` does it


def programs() -> dict[str, str]:
    """The first line of each one's docstring, by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found
