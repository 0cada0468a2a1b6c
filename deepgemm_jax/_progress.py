"""A progress bar on standard error, where that is a terminal."""

from __future__ import annotations

import sys

WIDTH = 30


class Progress:
    """``with Progress("compile", total=12) as progress: … progress.advance("what is done")``"""

    def __init__(self, label: str, total: int):
        self._label = label
        self._total = total
        self._done = 0
        self._shown = sys.stderr.isatty() and total > 0

    def __enter__(self) -> Progress:
        self._draw("")
        return self

    def advance(self, note: str = "") -> None:
        self._done += 1
        self._draw(note)

    def print(self, line: str) -> None:
        """Prints to standard output, above the bar."""
        self._write("")
        print(line, flush=True)

    def __exit__(self, *_) -> None:
        self._write("")

    def _draw(self, note: str) -> None:
        filled = WIDTH * self._done // max(self._total, 1)
        bar = "█" * filled + "░" * (WIDTH - filled)
        self._write(f"{self._label} {bar} {self._done}/{self._total} {note}")

    def _write(self, line: str) -> None:
        if self._shown:
            # Return to the line's start and clear it: whatever is printed next takes its place.
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
