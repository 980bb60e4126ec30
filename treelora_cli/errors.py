"""The one error tree: every failure a user can mend is a message, a hint and an exit code.

Exit codes: 0 done; 1 internal error; 2 wrong usage or recipe; 3 bad data or model; 4 run
directory missing, damaged or of another version; 5 run directory busy; 6 the environment (a
package, a device or disk space is missing); 7 training diverged; 128 + signal interrupted.
"""

from __future__ import annotations

from typing import ClassVar


class TreeloraError(Exception):
    """A failure with a cause the user can act on.

    Args:
        message: what is wrong and where, in one line.
        hint: how to mend it, in one line; may be empty.
    """

    code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def exit_code(self) -> int:
        """The process exit code documented for this kind of failure."""
        return self.code


class UsageError(TreeloraError):
    """A wrong flag, task name, recipe key or value."""

    code = 2


class DataError(TreeloraError):
    """A data file or model folder that cannot be used as it is."""

    code = 3


class RunDirError(TreeloraError):
    """A run directory that is missing, damaged or of another format version."""

    code = 4


class BusyError(TreeloraError):
    """A run directory that another process is writing to."""

    code = 5


class EnvironmentProblem(TreeloraError):  # noqa: N818
    """A package, a device or disk space that the machine lacks."""

    code = 6


class DivergedError(TreeloraError):
    """A loss, penalty or gradient that is no longer a finite number."""

    code = 7


class Interrupted(TreeloraError):  # noqa: N818
    """A run stopped by a signal after its state was saved.

    Args:
        signum: the signal's number (1 HUP, 2 INT, 15 TERM); the exit code is 128 + signum.
        message: what was saved.
        hint: the command that goes on from there.
    """

    def __init__(self, signum: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number."""
        return 128 + self.signum


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint that names the closest known names and lists them all.

    Args:
        name: what the user wrote.
        known: every valid name.
    """
    import difflib

    lowered = {candidate.lower(): candidate for candidate in known}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=2)]
    listing = ", ".join(known)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}? known: {listing}"
    return f"known: {listing}"
