"""Several processes on this machine: start them, pass signals on, end all when one has failed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from treelora_cli.errors import EnvironmentProblem

if TYPE_CHECKING:
    from treelora_cli.engine.world import World

GRACE = 15.0
"""Seconds the others get to notice by themselves that one has ended, before they are told to."""
_LIFELINE = "TREELORA_LIFELINE"
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def rank() -> int:
    """Return this process's number, as its launcher said; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Tell whether a launcher (ours, torchrun, deepspeed) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Processes on this machine that work together, one for each GPU; for several machines "
        "start with torchrun or deepspeed.",
        show_default=False,
    ),
]


@contextmanager
def together(count: int | None) -> Iterator[World]:
    """Be one of several processes, started here unless a launcher has started them; or be alone.

    Args:
        count: processes that were asked for; None: as many as a launcher has started, else one.

    Raises:
        EnvironmentProblem: a launcher has started another number, or they cannot meet.
    """
    if (count or 1) > 1 and not launched():
        raise typer.Exit(launch(count or 1))
    from treelora_cli.engine.world import joined

    with joined(count) as world:
        yield world


def launch(count: int) -> int:
    """Run this very command in so many processes; return the exit code to leave with.

    The first one's output is this process's. What another one says is shown where it is the one
    that failed. Ctrl-C and termination reach each of them once.

    Args:
        count: processes, at least 2.
    """
    port = _free_port()
    reading, writing = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    said: list[IO[bytes] | None] = []
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    try:
        for number in _SIGNALS:
            signal.signal(number, forward)
        for at in range(count):
            # Closed with this process; what is said is read when all have ended.
            said.append(None if at == 0 else tempfile.TemporaryFile())  # noqa: SIM115
            children.append(_start(at, count, port, reading, said[-1]))
        os.close(reading)
        failed = _watch(children)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writing)
    if failed and _says_more(children[failed].returncode, children[0].returncode):
        _tell(failed, children[failed].returncode, said[failed])
    codes = [_code(child.returncode) for child in children]
    return codes[0] or next((code for code in codes if code), 0)


def _start(
    at: int, count: int, port: int, lifeline: int, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(at),
        "LOCAL_RANK": str(at),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _LIFELINE: str(lifeline),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    threads = max(1, (os.cpu_count() or 1) // count)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    quiet: dict[str, Any] = {} if output is None else {"stdout": output, "stderr": output}
    return subprocess.Popen(  # noqa: S603 - this very program
        [sys.executable, "-m", "treelora_cli", *sys.argv[1:]],
        env=environment,
        # Apart from the terminal: Ctrl-C would reach a child twice, and twice means at once.
        start_new_session=True,
        pass_fds=(lifeline,),
        **quiet,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _watch(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; return which failed first, None for none."""
    failed: int | None = None
    deadline = 0.0
    while any(child.poll() is None for child in children):
        time.sleep(0.05)
        if failed is None:
            failed = _first_failed([child.poll() for child in children])
            deadline = time.monotonic() + GRACE
        elif time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
    if failed is None:
        failed = _first_failed([child.returncode for child in children])
    return failed


def _first_failed(codes: Sequence[int | None]) -> int | None:
    """Return which of the processes seen to have failed at once was the cause; None for none.

    The others end with a broken group soon after one is killed or finds a fault of its own.
    """
    failed = [at for at, code in enumerate(codes) if code]
    broken = EnvironmentProblem.code
    # One ended by a signal before one that says why, and that before one that only noticed.
    return min(failed, key=lambda at: ((codes[at] or 0) > 0, codes[at] == broken), default=None)


def _tell(at: int, code: int, said: IO[bytes] | None) -> None:
    text = ""
    if said is not None:
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    sys.stderr.write(f"process {at} {how}\n" + (f"{text}\n" if text else ""))


def _says_more(code: int, first: int) -> bool:
    """Tell whether the process that failed said what the first one did not.

    What is wrong with a command all processes say alike, and the first one's line is there already;
    that another one has ended is all the first one knows of a broken environment.
    """
    return code != first or code == EnvironmentProblem.code


def _code(code: int) -> int:
    return 128 - code if code < 0 else code


def leave(code: int) -> NoReturn:
    """End this process.

    One of several ends at once: gloo's threads may still let go of tensors after the last exchange,
    and where Python is being taken down meanwhile they abort the process (pytorch#190489).
    """
    if launched():
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def hold_lifeline() -> None:
    """End with the process that started this one, however that ended: nothing is left running."""
    lifeline = os.environ.pop(_LIFELINE, None)
    if lifeline is None:
        return

    def wait() -> None:
        os.read(int(lifeline), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        # One that waits for another process would never look at the signal.
        time.sleep(2 * GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
