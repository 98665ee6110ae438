"""The options of a command, read by argparse: a mistake is one sentence, and a near name is suggested."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ops.mistakes import USER
from ops.text import printable, suggestion


class OptionParser(argparse.ArgumentParser):
    """argparse's parser, without its usage of several lines above each error."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(prog=prog, description=(description or "").replace("``", "`"))

    def parse_args(  # type: ignore[override]  # argparse has an overload for each kind of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse a command line; ends the process with exit status 2 if it is wrong."""
        given, left = self.parse_known_args(args, namespace)
        if left:
            self._refuse(left)
        return given

    def error(self, message: str) -> NoReturn:
        """Print one sentence, and end the process."""
        self._end(f"{self.prog}: {message}; `{self.prog} --help` shows its options")

    def _refuse(self, left: Sequence[str]) -> NoReturn:
        """End the process because of words that the command does not know."""
        for word in left:
            option = word.partition("=")[0]
            if option.startswith("-"):
                near = suggestion(option, self._option_string_actions)
                self._end(f"there is no option {option}{near or f': `{self.prog} --help` lists them'}")
        self._end(
            f"{left[0]} is one word too many: text with spaces needs quotes; `{self.prog} --help` shows what is taken"
        )

    def _end(self, sentence: str) -> NoReturn:
        print(printable(" ".join(sentence.split())), file=sys.stderr)
        sys.exit(USER)
