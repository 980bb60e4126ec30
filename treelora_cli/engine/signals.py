"""Stop when asked: a signal sets a flag, work stops at the next safe point; a second: at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from treelora_cli.errors import Interrupted

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Catches HUP, INT and TERM while entered; handlers are put back on leaving.

    The handler itself does nothing but remember, so a save in progress is never cut in two.

    Args:
        agree: the largest of all processes' numbers, where several work together: a signal may
            reach one of them and not yet another. All must then ask at the same places.
    """

    def __init__(self, agree: Callable[[int], int] = int) -> None:
        self.signum: int | None = None
        self._agree = agree
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

    def asked(self) -> int | None:
        """Return the signal that came, to whichever process."""
        return self._agree(self.signum or 0) or None

    def raise_if_set(self, message: str, hint: str = "") -> None:
        """Stop here if a signal came.

        Raises:
            Interrupted: with the signal's exit code.
        """
        signum = self.asked()
        if signum is not None:
            raise Interrupted(signum, message, hint)
