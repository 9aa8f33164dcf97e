"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string and withholds text that may turn out to be the beginning of one.

    The answer does not depend on how the text is cut into pieces: of several stop strings, the one that is complete
    first counts, and of those that end at the same place the longest.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include  # keep the stop string in the text
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string if one was found: nothing that follows counts then."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(
            ((start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0), default=None
        )
        if found is not None:
            self._held = ""
            end, start, stop = found
            return text[: end if self._include else start], stop
        shown = len(text) - self._num_withheld(text)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """What was withheld, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _num_withheld(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                start = text.find(stop[0], start + 1)
        return longest
