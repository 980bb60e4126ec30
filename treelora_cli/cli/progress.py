"""Show a run's events: a live display on a terminal, one line a task elsewhere, or JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from treelora_cli.cli.output import print_json_line, stderr

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Event = dict[str, Any]


@contextmanager
def viewer(as_json: bool) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events.

    Args:
        as_json: print every event as one line of JSON on stdout.
    """
    if as_json:
        yield print_json_line
    elif sys.stderr.isatty():
        with _Display() as display:
            yield display.show
    else:
        yield PlainLines().show


def describe_start(event: Event) -> str:
    """Return the line that says what is about to run."""
    if event["tasks"] and not event["todo"]:
        return "nothing to do: all tasks are done"
    model = event["model"] + (" (synthetic)" if event["builtin_base"] else "")
    data = "built-in synthetic tasks" if event["builtin_data"] else "tasks"
    left = f"{len(event['todo'])} of {len(event['tasks'])} {data}"
    return (
        f"{event['method']} on {model}: {left}, {event['trainable_parameters']:,} trainable "
        f"parameters, in {event['run_dir']}"
    )


def _truncation(event: Event) -> str | None:
    if not event["truncated"]:
        return None
    return f"{_title(event)}: {event['truncated']} of {event['rows']} training rows were cut to fit"


_LINES: dict[str, Callable[[Event], str | None]] = {
    "run_started": describe_start,
    "task_started": _truncation,
    "waiting": lambda event: "waiting for task names on standard input (end it with Ctrl-D)",
    "merged": lambda event: (
        f"{' with '.join('+'.join(side) for side in event['sides'])} merged into one adapter, "
        f"error {event['error']:.3g}"
    ),
    "skipped": lambda event: f"{event['task']}: {event['why']}",
    "resumed": lambda event: f"resumed {event['task']} after step {event['step']}",
}


class PlainLines:
    """One line a task, for logs and pipes."""

    def __init__(self) -> None:
        self._scores: dict[str, float] = {}
        self._last: Event = {}
        self._started: Event = {}

    def show(self, event: Event) -> None:
        """Take an event and print a line where a task has come to its end."""
        line = self.line(event)
        if line:
            stderr().print(line, markup=False)

    def line(self, event: Event) -> str | None:
        """Return what to say of an event, if anything."""
        kind = event["kind"]
        if kind == "task_started":
            self._started, self._scores = event, {}
        elif kind == "step":
            self._last = event
        elif kind == "evaluated" and event["adapter"] != "base":
            self._scores[event["task"]] = event["score"]
        elif kind == "task_finished":
            return self._finished(event)
        return _LINES[kind](event) if kind in _LINES else None

    def _finished(self, event: Event) -> str:
        name = event["task"]
        of = self._started.get("of", "?")
        parts = [f"[{event['index'] + 1}/{of}] {_title(event)}"]
        if self._last.get("task") == name:
            parts.append(f"loss {self._last['loss']:.3f}")
            if self._last.get("penalty") is not None:
                parts.append(f"penalty {self._last['penalty']:.4f}")
            parts.append(f"{self._last['tokens_per_second']:,} tokens/s")
        if name in self._scores and name == _title(event):
            parts.append(f"score {self._scores[name]:.3f}")
        seconds = event["seconds"]
        if "train" in seconds:
            parts.append(f"trained {seconds['train']:.0f} s")
        parts.append(f"evaluated {seconds['evaluate']:.0f} s")
        return "  ".join(parts)


def _title(event: Event) -> str:
    """What is trained: a task, or several at once."""
    tasks = event.get("tasks", [event["task"]])
    return str(event["task"]) if len(tasks) == 1 else f"{len(tasks)} tasks at once"


class _Display:
    """A bar for the stream, a bar for the task, and finished tasks scrolling above them."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._lines = PlainLines()
        self._progress: Progress = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr(),
        )
        self._stream: TaskID | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Move the bars, and print a line above them where one is due."""
        kind = event["kind"]
        if kind == "run_started":
            total = len(event["tasks"])
            done = total - len(event["todo"])
            self._stream = self._progress.add_task("stream", total=total, completed=done, note="")
        elif kind == "task_started":
            self._begin_task(event)
        elif kind == "step" and self._task is not None:
            self._progress.update(self._task, completed=event["step"], note=_note(event))
        elif kind == "evaluated" and self._stream is not None:
            asked = f"asked {event['task']} after {event['after'] or 'nothing'}"
            self._progress.update(self._stream, note=f"{asked}: {event['score']:.3f}")
        elif kind == "task_finished" and self._stream is not None:
            self._progress.advance(self._stream, len(event.get("tasks", "1")))
        line = self._lines.line(event)
        if line:
            self._progress.console.print(line, markup=False)

    def _begin_task(self, event: Event) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        place = f"{event['index'] + 1}/{event['of']} {_title(event)}"
        self._task = self._progress.add_task(
            place, total=event["steps"], completed=event["from_step"], note=""
        )


def _note(event: Event) -> str:
    note = f"loss {event['loss']:.3f}"
    if event.get("penalty") is not None:
        note += f"  penalty {event['penalty']:.4f}"
    return f"{note}  {event['tokens_per_second']:,} tokens/s"
