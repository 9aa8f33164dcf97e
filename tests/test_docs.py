"""What the documentation says and a program can check."""

import re
import subprocess
from pathlib import Path

import pytest

from quire.launch.options import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("worker/models/*/README.md")]
)
PACKAGES = ("common", "frontend", "kernels", "launch", "scheduler", "worker", "tests", "benchmarks")


def test_the_readmes_options_are_the_options() -> None:
    """Regenerate with `python -m quire.launch.options`."""
    found = re.search(
        r"<!-- options:.*?-->\n(.*?)\n<!-- end of options -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found and found.group(1).strip() == markdown().strip()


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths of Python files in backquotes, from the root or from the page's folder."""
    named = re.findall(r"`((?:[\w.]+/)*\w+\.py)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not list(page.parent.rglob(name))]
    assert not missing


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_lives_in_it(package: str) -> None:
    assert (ROOT / package / "README.md").is_file()


def test_nothing_speaks_of_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {
        name: (ROOT / name).read_text(errors="replace")
        for name in tracked
        if name.endswith((".py", ".md", ".toml", ".json"))
    }
    assert not [
        name
        for name, text in texts.items()
        if re.search(r"/(?:root|home/\w+)/(?!\.)", text) and name != "tests/test_docs.py"
    ]
