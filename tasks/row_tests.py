"""Tests of rows, run on the completions of both models at a time; results that are known are not computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model.files import sha256_json
from ops.sandbox.guards import SECONDS, RowResult, Snippet, run_tests


class RowTests:
    """Runs the tests.

    Args:
        known: results by ``content_of``.

    Attributes:
        of_base: settled results of the base's completions, those that were known included.
    """

    def __init__(self, known: Mapping[str, RowResult]):
        self.of_base = dict(known)

    def run(
        self, base: Sequence[Snippet], tuned: Sequence[Snippet], seconds: float = SECONDS
    ) -> tuple[list[RowResult], list[RowResult]]:
        """The results of both models' completions. Equal ones are run once.

        Args:
            seconds: time limit of a row.
        """
        names = [[content_of(snippet, seconds) for snippet in part] for part in (base, tuned)]
        snippets = dict(zip([*names[0], *names[1]], [*base, *tuned], strict=True))
        missing = [name for name in snippets if name not in self.of_base]
        found = dict(zip(missing, run_tests([snippets[name] for name in missing], seconds), strict=True))
        results = self.of_base | found
        self.of_base |= {name: results[name] for name in names[0] if results[name].is_settled}
        return [results[name] for name in names[0]], [results[name] for name in names[1]]


def content_of(snippet: Snippet, seconds: float) -> str:
    """A hash of code, tests and time limit."""
    code, tests = snippet
    return sha256_json([code, list(tests), seconds])
