"""Who may import whom, which packages are free of torch, and that what is packaged is what is there."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "common": {"common"},
    "kernels": {"kernels"},
    "scheduler": {"scheduler", "common"},
    "frontend": {"frontend", "common"},
    "worker": {"worker", "common", "kernels"},
    "launch": {"launch", "common", "frontend", "scheduler", "worker"},
}
THIRD_PARTY_OF_KERNELS = {"torch", "triton", "numpy", "numba", "llvmlite"}
TORCH_FREE = ("common", "frontend", "scheduler", "launch")
NEVER = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that `path` names in an import, ours as quire.package.module, TYPE_CHECKING blocks included."""
    package = ("quire", *path.relative_to(ROOT).parent.parts)
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names] if node.level or module == "quire" else [module]
            found += [(name, node.lineno) for name in names]
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_their_layer_allows(package: str) -> None:
    wrong = []
    for path in sources(package):
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] == "quire" and len(parts) > 1 and parts[1] not in MAY_IMPORT[package] | {"__version__"}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong


def test_kernels_import_nothing_but_torch_and_triton() -> None:
    allowed = THIRD_PARTY_OF_KERNELS | set(sys.stdlib_module_names) | {"quire"}
    assert not [
        f"{path.name}:{line} imports {name}"
        for path in sources("kernels")
        for name, line in imports(path)
        if name.split(".")[0] not in allowed
    ]


def test_imports_between_our_packages_are_relative() -> None:
    """Scripts of launch/ run as files, where nothing relative resolves; all else follows the repository's layout."""
    scripts = {"serve.py", "frontend.py", "scheduler.py", "worker.py"}
    wrong = []
    for package in MAY_IMPORT:
        for path in sources(package):
            if package == "launch" and path.name in scripts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                absolute = (
                    isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "quire"
                )
                absolute |= isinstance(node, ast.Import) and any(a.name.split(".")[0] == "quire" for a in node.names)
                if absolute:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_nothing_can_unpickle_or_evaluate() -> None:
    wrong = []
    for package in MAY_IMPORT:
        for path in sources(package):
            wrong += [f"{path}:{line} imports {name}" for name, line in imports(path) if name.split(".")[0] in NEVER]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    if called in {"eval", "exec", "torch.load"} or called.endswith((".recv_pyobj", ".send_pyobj")):
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {called}")
    assert not wrong


@pytest.mark.parametrize("package", TORCH_FREE)
def test_importing_every_module_of_a_torch_free_package_leaves_torch_out(package: str) -> None:
    modules = [
        ".".join(("quire", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for p in sources(package)
    ]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint([m for m in ('torch', 'triton', 'numba') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_packages_that_are_declared_are_the_packages_that_are_there() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {"quire"} | {
        ".".join(("quire", *p.parent.relative_to(ROOT).parts))
        for package in (*MAY_IMPORT, "benchmarks")
        for p in (ROOT / package).rglob("__init__.py")
    }
    assert declared == there


def test_at_most_twenty_direct_dependencies() -> None:
    assert len(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]) <= 20


def test_no_module_of_launch_hides_one_of_the_standard_library() -> None:
    """A script puts its own folder first on sys.path."""
    assert not {p.stem for p in sources("launch")} & set(sys.stdlib_module_names)


def test_importing_quire_imports_none_of_its_parts() -> None:
    code = "import sys, quire; print(sorted(m for m in sys.modules if m.startswith('quire.') or m in ('torch', 'zmq', 'msgspec')))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_files_tell_one_story_and_functions_fit_a_screen(package: str) -> None:
    long = []
    for path in sources(package):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long
