"""Named places where a test can make the process fail: a no-op unless TREELORA_FAULT is set.

``TREELORA_FAULT="<point>:<action>[:n]"`` acts on the n-th passage (default 1) of the point:
``kill9``, ``term``, ``int``, ``hup`` send that signal to the process, ``enospc`` and ``eio``
raise the matching OSError, ``exit`` leaves at once with code 99, ``sleep`` waits (60 s, or
TREELORA_FAULT_SECONDS).
"""

from __future__ import annotations

import errno
import os
import signal
import time

ENVIRONMENT = "TREELORA_FAULT"
EXIT_CODE = 99

_SIGNALS = {
    "kill9": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
ACTIONS = (*_SIGNALS, *_ERRORS, "exit", "sleep")

_passages: dict[str, int] = {}


def hit(point: str) -> None:
    """Pass the named point; fail here if the environment asks for it.

    Raises:
        OSError: the action is ``enospc`` or ``eio``.
        ValueError: TREELORA_FAULT cannot be read.
    """
    spec = os.environ.get(ENVIRONMENT)
    if not spec:
        return
    wanted, action, nth = _parse(spec)
    if wanted != point:
        return
    _passages[spec] = _passages.get(spec, 0) + 1
    if _passages[spec] == nth:
        _act(action, point)


def reset() -> None:
    """Forget how often points were passed."""
    _passages.clear()


def _parse(spec: str) -> tuple[str, str, int]:
    point, _, rest = spec.partition(":")
    action, _, nth = rest.partition(":")
    if not point or action not in ACTIONS or not (nth or "1").isdecimal():
        raise ValueError(f"{ENVIRONMENT}={spec!r} is not <point>:<{'|'.join(ACTIONS)}>[:n]")
    return point, action, int(nth or "1")


def _act(action: str, point: str) -> None:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action in _ERRORS:
        raise OSError(_ERRORS[action], f"{os.strerror(_ERRORS[action])} (injected at {point})")
    elif action == "exit":
        os._exit(EXIT_CODE)
    else:
        time.sleep(float(os.environ.get("TREELORA_FAULT_SECONDS", "60")))
