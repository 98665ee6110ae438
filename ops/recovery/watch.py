"""``python -m ops.recovery.watch``: closes the runs of dead processes and frees leaked slots, every 30 s."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from types import FrameType

# Without a server there is nothing to watch, and Prefect's client should not start a temporary one.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

from prefect.client.orchestration import SyncPrefectClient, get_client

from ops.recovery.doctor import connect, examine_slots
from ops.recovery.lost import end_lost, lost_runs
from ops.recovery.reaper import HOOK_SECONDS, reap
from ops.servers import gpu_count
from ops.settings import Settings

SECONDS = 30.0
_log = logging.getLogger("watch")


class Watcher:
    """Repairs the state of runs and slots at each call of ``check``; errors of a server are logged once.

    Attributes:
        suspected: texts of the slot findings of the last check.
        missed: reasons of the flow runs that seemed lost at the last check.
        errors: last error by what failed, "Prefect", "MLflow", "runs" or "limit".
    """

    def __init__(self, settings: Settings, gpus: int):
        self.settings = settings
        self.gpus = gpus
        self.suspected: set[str] = set()
        self.missed: set[str] = set()
        self.errors: dict[str, str] = {}

    def check(self) -> list[str]:
        """Look once. Returns a line for each thing that was mended."""
        with get_client(sync_client=True) as prefect:
            missing = connect(prefect)
            self._report("Prefect", missing)
            lines: list[str] = []
            try:
                lines += reap(self.settings.tracking_uri, None if missing else prefect, HOOK_SECONDS)
                self._report("MLflow", None)
            except Exception as error:
                self._report("MLflow", f"MLflow: {type(error).__name__}")
            if not missing:
                lines += self._end_lost(prefect)
                lines += self._mend_slots(prefect)
        return lines

    def _end_lost(self, prefect: SyncPrefectClient) -> list[str]:
        """End runs that were lost at two checks in a row: a worker that lives reports the end of a process itself."""
        try:
            found = lost_runs(prefect)
            confirmed = {reason: run for reason, run in found.items() if reason in self.missed}
            self.missed = set(found)
            uri = self.settings.tracking_uri
            ended = [f"{reason}: ended" for reason, run in confirmed.items() if end_lost(prefect, uri, run, reason)]
            self._report("runs", None)
            return ended
        except Exception as error:
            self._report("runs", f"lost flow runs were not looked for: {type(error).__name__}: {error}")
            return []

    def _mend_slots(self, prefect: SyncPrefectClient) -> list[str]:
        """Mend findings of two checks in a row: the server counts a slot a moment before it has the lease."""
        try:
            found = {finding.text: finding for finding in examine_slots(prefect, self.gpus) if finding.mend}
            confirmed = [finding for text, finding in found.items() if text in self.suspected]
            self.suspected = set(found)
            for finding in confirmed:
                assert finding.mend
                finding.mend()
            self._report("limit", None)
            return [f"{finding.text}: mended" for finding in confirmed]
        except Exception as error:
            self._report("limit", f"the limit was not examined: {type(error).__name__}: {error}")
            return []

    def _report(self, what: str, error: str | None) -> None:
        """Log an error when it is new, and when it is over (None)."""
        before = self.errors.pop(what, None)
        if error:
            self.errors[what] = error
            if error != before:
                _log.warning(error)
        elif before:
            _log.info("%s answers again", what)


def main() -> int:
    """Watch until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    for noisy in ("httpx", "alembic", "mlflow", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    stops: list[int] = []

    # A list and no Event: its lock may be held by the main thread, which the signal interrupts.
    def end(number: int, frame: FrameType | None) -> None:
        stops.append(number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    watcher = Watcher(Settings.load(), gpu_count())
    _log.info("watching %s every %g s", watcher.settings.tracking_uri, SECONDS)
    while not stops:
        for line in watcher.check():
            _log.info(line)
        next_check = time.monotonic() + SECONDS
        while not stops and time.monotonic() < next_check:
            time.sleep(0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
