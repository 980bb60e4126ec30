"""Stop when asked: a signal sets a flag, work stops at the next safe point; a second: at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from treelora_cli.errors import Interrupted

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Catches HUP, INT and TERM while entered; handlers are put back on leaving.

    The handler itself does nothing but remember, so a save in progress is never cut in two.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._remember)  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum

    def raise_if_set(self, message: str, hint: str = "") -> None:
        """Stop here if a signal came.

        Raises:
            Interrupted: with the signal's exit code.
        """
        if self.signum is not None:
            raise Interrupted(self.signum, message, hint)
