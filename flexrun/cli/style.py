"""How the command line speaks: complaint first, remedy last, colour only where a person is looking."""

from __future__ import annotations

import os
import sys

_RED, _CYAN = "31", "36"


def print_error(message: str, hint: str | None) -> None:
    """``error: ...`` on stderr, then after a blank line ``hint: ...``."""
    print(f"{_paint('error:', _RED)} {message}", file=sys.stderr)
    if hint:
        print(f"\n{_paint('hint:', _CYAN)} {hint}", file=sys.stderr)


def _paint(text: str, colour: str) -> str:
    # https://no-color.org: any non-empty value turns colours off
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty():
        return text
    return f"\x1b[1;{colour}m{text}\x1b[0m"
