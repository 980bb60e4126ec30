"""Where everything in a run directory is, and how to open one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.atomic import ensure_dir, read_unit, sweep, write_file, write_json
from treelora_cli.rundir.files import LEFTOVER
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.lock import HOLDER, OS_LOCK
from treelora_cli.rundir.runinfo import RunInfo, TaskEntry, read_info
from treelora_cli.rundir.storage import storage_errors

_FILES = (
    "run.json",
    "recipe.yaml",
    "events.jsonl",
    "scores.json",
    HOLDER,
    "tree/tree.json",
    "merged/merged.json",
)
_FOLDERS = ("tasks", "tree", "tree/history", "checkpoint", "predictions", "merged")
_BEFORE_RUN_JSON = frozenset({OS_LOCK, HOLDER, "recipe.yaml"})


class RunDir:
    """The paths of a run directory; ``open`` and ``create`` also give it its ``info``.

    Args:
        path: the directory; nothing is read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._info: RunInfo | None = None

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run.

        Raises:
            RunDirError: missing, no run, of another version, damaged, or with an entry that is
                a symbolic link.
        """
        run = cls(path)
        with storage_errors(run.path, "open"):
            run._check_entries()
        run._info = read_info(run.run_json)
        return run

    @classmethod
    def create(cls, path: str | Path, info: RunInfo, recipe: str | None = None) -> RunDir:
        """Make a run in a new or empty folder whose lock is held; run.json is written last.

        Args:
            path: the folder.
            info: the content of run.json.
            recipe: the content of recipe.yaml, where the caller does not write it before.

        Raises:
            RunDirError: the folder holds a run or other files, or cannot be written to.
            EnvironmentProblem: the disk is full.
        """
        run = cls(path)
        if os.path.lexists(run.run_json):
            raise RunDirError(f"{run.path} holds a run already", "choose another --run-dir")
        ensure_dir(run.path)
        for name in sorted(path.name for path in run.path.iterdir()):
            if name not in _BEFORE_RUN_JSON and not LEFTOVER.fullmatch(name):
                raise RunDirError(
                    f"{run.path} is not empty (it holds {name}) and is no run",
                    "choose a new or empty folder as --run-dir",
                )
        sweep(run.path)
        if recipe is not None:
            write_file(run.recipe_yaml, recipe)
        run._info = info
        run.save_info()
        return run

    def _check_entries(self) -> None:
        if not self.path.exists():
            raise RunDirError(
                f"there is no run directory {self.path}",
                "check the path, or make one with `treelora train-stream --run-dir …`",
            )
        if not self.path.is_dir():
            raise RunDirError(f"{self.path} is a file, not a run directory", "give the folder")
        if "run.json" not in {entry.name for entry in self.path.iterdir()}:
            raise RunDirError(
                f"{self.path} is not a run directory: it has no run.json",
                "give the folder that `treelora train-stream` wrote",
            )
        for name in (*_FILES, *_FOLDERS):
            if (self.path / name).is_symlink():
                raise RunDirError(
                    f"{self.path / name} is a symbolic link",
                    "put the file or folder itself in its place (the run directory as a whole "
                    "may be a link)",
                )

    @property
    def info(self) -> RunInfo:
        """What run.json holds; change it and call ``save_info``."""
        if self._info is None:
            self._info = read_info(self.run_json)
        return self._info

    def save_info(self) -> None:
        """Write run.json.

        Raises:
            EnvironmentProblem: the disk is full.
            RunDirError: another failure of the file system.
        """
        write_json(self.run_json, self.info.to_json())

    def sweep(self) -> list[Path]:
        """Clean up what dead writers left; only for the owner of the lock.

        Returns:
            The leftovers dealt with.
        """
        fixed = (self.tasks, self.tree, self.tree / "history", self.checkpoints, self.merged)
        tasks = sorted(self.tasks.iterdir()) if self.tasks.is_dir() else []
        units = (self.path, *tasks)
        places = [self.path, *fixed, *tasks, *(unit / "predictions" for unit in units)]
        return [left for place in places if not _leaves(place, self.path) for left in sweep(place)]

    def finished_tasks(self) -> list[TaskEntry]:
        """Return the entries of the finished tasks, in the order of the stream."""
        return [entry for entry in self.info.tasks if entry["status"] == "finished"]

    def read_task(self, index: int) -> dict[str, Any]:
        """Return a task's task.json, its folder verified first.

        Raises:
            RunDirError: the run has no such task, its folder is missing or damaged, or is
                another task's.
        """
        if not 0 <= index < len(self.info.tasks):
            raise RunDirError(
                f"{self.path} has no task {index}", f"it has {len(self.info.tasks)} tasks, from 0"
            )
        name = self.info.tasks[index]["name"]
        folder = self.task_dir(index, name)
        doc: dict[str, Any] = read_unit(folder, lambda place: read_json(place / "task.json"))
        if doc.get("name") != name or doc.get("index") != index:
            raise RunDirError(
                f"{folder} holds task {doc.get('index')} {doc.get('name')!r}, not {index} {name!r}",
                "folders of the run were swapped or renamed; put them back",
            )
        return doc

    @property
    def run_json(self) -> Path:
        """The file whose presence makes the folder a run."""
        return self.path / "run.json"

    @property
    def recipe_yaml(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def events(self) -> Path:
        """The log of events, JSON lines."""
        return self.path / "events.jsonl"

    @property
    def scores(self) -> Path:
        """The evaluation cells."""
        return self.path / "scores.json"

    @property
    def lock(self) -> Path:
        """The note that names the writer."""
        return self.path / HOLDER

    @property
    def tasks(self) -> Path:
        """The folder of the task folders."""
        return self.path / "tasks"

    @property
    def tree(self) -> Path:
        """The folder of the gradient tree."""
        return self.path / "tree"

    @property
    def tree_json(self) -> Path:
        """The current tree."""
        return self.tree / "tree.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints of the task in flight."""
        return self.path / "checkpoint"

    @property
    def checkpoint_current(self) -> Path:
        """One line: the name of the newest checkpoint."""
        return self.checkpoints / "current"

    def checkpoint_dir(self, step: int) -> Path:
        """The checkpoint at an optimizer step of the task in flight."""
        return self.checkpoints / f"step-{step:08d}"

    def tree_history(self, index: int, name: str) -> Path:
        """The unit that holds the tree as it was after a task."""
        return self.tree / "history" / f"{index:03d}-{name}"

    def task_dir(self, index: int, name: str) -> Path:
        """The unit that holds what a task left."""
        return self.tasks / f"{index:03d}-{name}"

    @property
    def merged(self) -> Path:
        """The folder of the adapters that answer for several tasks each."""
        return self.path / "merged"

    @property
    def merged_json(self) -> Path:
        """Which tasks a merged adapter answers for now; see ``rundir.merged``."""
        return self.merged / "merged.json"

    def merged_dir(self, unit: str) -> Path:
        """The unit of one merged adapter."""
        return self.merged / unit

    def predictions(
        self, after: tuple[int, str] | None, task: str, adapter: str, split: str
    ) -> Path:
        """The JSON lines of one cell's answers.

        Args:
            after: (index, name) of the last trained task, or None before any training.
            task: the evaluated task.
            adapter: as a cell of scores.json names it.
            split: the evaluated split.
        """
        place = self.path if after is None else self.task_dir(*after)
        slug = adapter.replace(":", "=")
        return place / "predictions" / f"{task}.{slug}.{split}.jsonl"


def _leaves(place: Path, root: Path) -> bool:
    """Tell whether a symbolic link leads from below ``root`` out of it."""
    return not place.resolve().is_relative_to(root.resolve())
