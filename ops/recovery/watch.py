"""``python -m ops.recovery.watch``: closes the runs of dead processes and frees leaked slots, every 30 s."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from types import FrameType

# Without a server there is nothing to watch: none is to be started for it.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

from prefect.client.orchestration import SyncPrefectClient, get_client

from ops.recovery.doctor import connect, examine_slots
from ops.recovery.reaper import HOOK_SECONDS, reap
from ops.servers import gpu_count
from ops.settings import Settings

SECONDS = 30.0
_log = logging.getLogger("watch")


class Watcher:
    """Looks again and again; trouble with a server is said once and outlived."""

    def __init__(self, settings: Settings, gpus: int):
        self.settings = settings
        self.gpus = gpus
        self.suspected: set[str] = set()
        self.troubles: dict[str, str] = {}

    def round(self) -> list[str]:
        """One look. Returns a line for each thing that was mended."""
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
                lines += self._mend_slots(prefect)
        return lines

    def _mend_slots(self, prefect: SyncPrefectClient) -> list[str]:
        """Mend what is wrong with the slots twice in a row: the server counts one a moment before it leases it."""
        try:
            found = {finding.text: finding for finding in examine_slots(prefect, self.gpus) if finding.mend}
            again = [finding for text, finding in found.items() if text in self.suspected]
            self.suspected = set(found)
            for finding in again:
                assert finding.mend
                finding.mend()
            self._report("limit", None)
            return [f"{finding.text}: mended" for finding in again]
        except Exception as error:
            self._report("limit", f"the limit was not examined: {type(error).__name__}: {error}")
            return []

    def _report(self, what: str, trouble: str | None) -> None:
        before = self.troubles.pop(what, None)
        if trouble:
            self.troubles[what] = trouble
            if trouble != before:
                _log.warning(trouble)
        elif before:
            _log.info("%s answers again", what)


def main() -> int:
    """Watch until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    for noisy in ("httpx", "alembic", "mlflow", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    stops: list[int] = []

    # It takes no lock, as an Event would: the signal may come while the main thread holds it.
    def end(number: int, frame: FrameType | None) -> None:
        stops.append(number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    watcher = Watcher(Settings.load(), gpu_count())
    _log.info("watching %s every %g s", watcher.settings.tracking_uri, SECONDS)
    while not stops:
        for line in watcher.round():
            _log.info(line)
        next_round = time.monotonic() + SECONDS
        while not stops and time.monotonic() < next_round:
            time.sleep(0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
