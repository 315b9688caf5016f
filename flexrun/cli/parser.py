"""argparse that complains the way the rest of the program does: with a hint that names the remedy."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from flexrun.cli.style import print_error


class Parser(argparse.ArgumentParser):
    def __init__(self, *arguments, **settings):
        settings.setdefault("allow_abbrev", False)  # a flag added later must not change what an old command means
        super().__init__(*arguments, **settings)

    def parse_known_args(self, args=None, namespace=None):
        # Overridden so that an unknown flag is reported by the command that got it, which knows the nearest one.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            print_error(
                f"unknown argument {flag!r}", f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
            )
            self.exit(2)
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        print_error(message, f"see {self.prog} --help")
        self.exit(2)
