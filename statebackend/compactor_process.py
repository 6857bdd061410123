"""The compactor as a process of its own beside the store that started it.

The store starts ``python -m statebackend compact URL --follow`` and watches it. Settings and storage options
go to it as one line on its stdin, never on its command line; it ends when its stdin does, so with its
parent, however that ends. When it dies it is started again, after a pause that doubles; meanwhile, and
whenever its claim shows no progress, the compactor inside of the store takes over.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from statebackend.compactor import SUPERSEDED_EXIT_CODE
from statebackend.errors import StateStoreError
from statebackend.manifest_store import Clock
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings

__all__ = ["CompactorProcess"]

_LOOK_S = 0.5
_PAUSE_S = (1.0, 60.0)  # before it is started again: first, longest
_STOP_S = 5.0

logger = logging.getLogger(__name__)


class CompactorProcess:
    """Starts, watches and stops the process. ``last_error``: how it ended, None while it runs.

    Raises ``ValueError`` when the storage options cannot be told to another process.
    """

    def __init__(
        self,
        url: str,
        settings: StoreSettings,
        storage_options: Mapping[str, Any] | None,
        root_options: Mapping[str, Mapping[str, Any]] | None,
        runtime: IsolatedRuntime,
        clock: Clock,
    ) -> None:
        try:
            self._told = json.dumps(
                {
                    "settings": dataclasses.asdict(settings) | {"compaction": "none", "metrics_port": None},
                    "storage_options": storage_options and dict(storage_options),
                    "root_options": root_options and {url: dict(of) for url, of in root_options.items()},
                }
            )
        except TypeError as error:
            raise ValueError(
                f"{url}: compaction in a process of its own needs plain storage options: {error}"
            ) from error
        self._url = url
        self._takeover_s = settings.compaction_takeover_s
        self._runtime = runtime
        self._clock = clock
        self._process: subprocess.Popen[str] | None = None
        self._last_line = ""
        self._stopping = False
        self.starts = 0
        self.last_error: StateStoreError | None = None

    @property
    def pid(self) -> int | None:
        """The process that runs now, if one does."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def watch(self) -> None:
        """Start it, and start it again whenever it ends; never returns."""
        pause = _PAUSE_S[0]
        while not self._stopping:
            began = self._clock.monotonic()
            try:
                process = await self._runtime.run_io(self._start)
            except OSError as error:
                self._ended(f"cannot be started: {error}")
            else:
                while (code := process.poll()) is None:
                    await self._clock.sleep(_LOOK_S)
                if self._stopping:
                    return
                if code == SUPERSEDED_EXIT_CODE:
                    # Another compactor is at work; to claim at once would only take turns with it.
                    logger.info("%s: another compactor took over from process %d", self._url, process.pid)
                    pause = self._takeover_s
                else:
                    self._ended(f"process {process.pid} ended with code {code}: {self._last_line or 'no message'}")
                    lived = self._clock.monotonic() - began
                    pause = _PAUSE_S[0] if lived > _PAUSE_S[1] else min(pause * 2, _PAUSE_S[1])
            await self._clock.sleep(pause)

    def stop(self) -> None:
        """Ask it to end, which releases its claim; it is killed when it does not end soon. Any thread."""
        self._stopping = True
        if (process := self._process) is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "statebackend", "compact", self._url, "--follow", "--supervised"]
        self._last_line = ""
        process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._process = process
        threading.Thread(target=self._read_errors, args=(process,), name="statestore-compactor", daemon=True).start()
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died already, which `watch` sees
            process.stdin.write(self._told + "\n")
            process.stdin.flush()
        self.starts += 1
        self.last_error = None
        logger.info("%s: compactor runs as process %d", self._url, process.pid)
        if self._stopping:
            self.stop()
        return process

    def _read_errors(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._last_line = line.strip() or self._last_line
                logger.debug("compactor process %d: %s", process.pid, line.rstrip())

    def _ended(self, how: str) -> None:
        self.last_error = StateStoreError(f"{self._url}: the compactor's {how}")
        logger.warning("%s; it is started again", self.last_error)
