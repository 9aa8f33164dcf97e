"""Where a terminal command reads and writes: colours and line editing in a terminal, plain text in a pipe."""

import sys

# What a model writes may not steer the terminal: control characters go, save tab and newline.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Screen:
    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._coloured = sys.stdout.isatty()
        self._open_line = False
        if self.interactive:
            import readline  # noqa: F401, PLC0415 (gives input() its editing and history)

    def read(self) -> str | None:
        """A line of the user's, or None at the end."""
        if not self.interactive:
            return sys.stdin.readline() or None
        try:
            return input("\n> ")
        except EOFError:
            print()
            return None

    def write(self, text: str) -> None:
        """A piece of an answer."""
        shown = text.translate(_CONTROLS) if self._coloured else text
        sys.stdout.write(shown)
        sys.stdout.flush()
        self._open_line = not shown.endswith("\n") if shown else self._open_line

    def end(self) -> None:
        """The answer is over: the next thing begins on a line of its own."""
        if self._open_line:
            self.write("\n")

    def note(self, text: str) -> None:
        """Something besides the answers: on stderr, so that a pipe holds answers only."""
        self._styled(text, "dim")

    def fail(self, text: str) -> None:
        self._styled(f"error: {text}", "red")

    def _styled(self, text: str, style: str) -> None:
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            return
        from rich.console import Console  # noqa: PLC0415 (only a terminal needs it)

        Console(stderr=True, highlight=False).print(text, style=style, markup=False)
