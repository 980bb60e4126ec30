"""The stream loop: before, train, commit, score, one task after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from treelora_cli.engine.adapters import ADAPTER, WEIGHTS_FILE
from treelora_cli.engine.batches import NoPlan
from treelora_cli.engine.evaluation import Evaluator, build_encoder
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.gradients import first_gradient
from treelora_cli.engine.matrix import Matrix
from treelora_cli.engine.merging import keep_to
from treelora_cli.engine.opening import Opened, append_task, new_method, open_for_training
from treelora_cli.engine.routes import Collected, Eye, collect
from treelora_cli.engine.seeds import derive
from treelora_cli.engine.share import check_shares
from treelora_cli.engine.shortage import explaining_shortage, training_hint
from treelora_cli.engine.signals import StopFlag
from treelora_cli.engine.store import Finished, load_optimizer, save_task
from treelora_cli.engine.training import StepResult, TaskTrainer
from treelora_cli.engine.units import Unit, facts, row_plan, units
from treelora_cli.engine.world import ALONE, World
from treelora_cli.errors import Interrupted, RunDirError, TreeloraError
from treelora_cli.methods.base import TaskContext
from treelora_cli.models.encode import Example
from treelora_cli.models.probe import Probe
from treelora_cli.recipe import Recipe
from treelora_cli.rundir import checkpoints
from treelora_cli.rundir.atomic import committed, write_json
from treelora_cli.rundir.events import EventLog
from treelora_cli.rundir.scores import Scores

Show = Callable[[dict[str, Any]], None]
Arrivals = Callable[[Callable[[], None]], Iterator[str]]


def run_stream(
    recipe: Recipe,
    path: Path,
    show: Show,
    arrivals: Arrivals | None = None,
    world: World = ALONE,
) -> None:
    """Train and score a stream, going on from whatever the run directory already holds.

    Args:
        recipe: resolved, see :func:`treelora_cli.engine.plan.resolve_recipe`.
        path: the run directory, existing or not.
        show: told of every event, as it is written to events.jsonl.
        arrivals: gives names of further tasks, each trained when it comes; it calls its argument
            while it waits; one process alone can wait for them.
        world: the processes that train together. All call this with the same arguments and a path
            that they share; the first scores, writes and shows.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong; what was finished before
            is kept, and an interrupted run goes on when called again.
    """
    with StopFlag(world.largest) as stop, open_for_training(recipe, path, world) as opened:
        _Stream(opened, stop, show).run(arrivals)


class _Stream:
    """One call of ``train-stream`` on a locked run directory."""

    def __init__(self, opened: Opened, stop: StopFlag, show: Show) -> None:
        self.lock = opened.lock
        self.world = opened.world
        self.run_dir = opened.run
        self.recipe = opened.recipe
        self.tasks = opened.tasks
        self.adapted = opened.adapted
        self.method = opened.method
        self.stop = stop
        self.show = show
        self.log = EventLog(opened.run.events)
        many = "" if self.world.alone else f" --nproc {self.world.size}"
        self.resume_hint = f"go on with: treelora train-stream --run-dir {opened.run.path}{many}"
        self.units = units(opened.method.mode, opened.tasks)
        evaluator = Evaluator(
            adapted=opened.adapted,
            data=opened.recipe.data,
            plan=opened.recipe.eval,
            run=opened.run,
            scores=Scores.load(opened.run.scores),
            limited=opened.recipe.limit is not None,
            emit=self.emit,
            stop=stop,
            questions=opened.method.questions,
            world=opened.world,
            spread=opened.world.spread,
        )
        self.matrix = Matrix(evaluator, opened.recipe.eval, opened.method.mode, opened.tasks)

    def emit(self, kind: str, fields: dict[str, Any]) -> None:
        """Log an event and show it, once for all processes."""
        if not self.world.first:
            return
        self.show(self.log.append(kind, sync=kind != "step", **fields))

    def run(self, arrivals: Arrivals | None) -> None:
        """Go through the stream; the run's status always tells how it ended."""
        info = self.run_dir.info
        self._set_run_status("running")
        names = [task.name for task in self.tasks]
        todo = [entry["name"] for entry in info.tasks if entry["status"] != "finished"]
        self.emit("run_started", self._run_facts() | {"tasks": names, "todo": todo})
        try:
            first = self._take_up()
            for number, unit in enumerate(self.units):
                self._one_unit(unit, trained=number < first)
            if arrivals is not None:
                self._wait_for(arrivals)
        except Interrupted as error:
            self._set_run_status("interrupted")
            self.emit("interrupted", {"signal": error.signum})
            raise Interrupted(error.signum, error.message, self.resume_hint) from None
        except BrokenPipeError:
            self._set_run_status("interrupted")
            raise
        except TreeloraError as error:
            self._set_run_status("failed")
            self.emit("failed", {"error": error.message})
            raise
        self._set_run_status("finished")
        self.emit("run_finished", {"tasks": [task.name for task in self.tasks]})

    def _set_run_status(self, status: str) -> None:
        self.run_dir.info.status = status
        self._save_info()

    def _save_info(self) -> None:
        if self.world.first:
            self.run_dir.save_info()

    def _wait_for(self, arrivals: Arrivals) -> None:
        """Train tasks as their names arrive; the lock stays held and says what is waited for."""
        if self.lock is None:
            raise RuntimeError("only the process that holds the lock can wait for tasks")
        note = "waiting for task names"
        names = arrivals(lambda: self.stop.raise_if_set(f"stopped while {note}"))
        while True:
            self.lock.note(note)
            self.emit("waiting", {"for": "task names"})
            name = next(names, None)
            self.lock.note("")
            if name is None:
                return
            if self.run_dir.info.task(name) is not None:
                self.emit("skipped", {"task": name, "why": "the run has it already"})
                continue
            self.recipe, task = append_task(self.run_dir, self.recipe, name)
            self.tasks.append(task)
            self.units = units(self.method.mode, self.tasks)
            self._one_unit(self.units[-1], trained=False)

    def _run_facts(self) -> dict[str, Any]:
        info = self.run_dir.info
        return {
            "method": info.method,
            "model": info.model,
            "builtin_base": info.builtin_base,
            "builtin_data": info.builtin_data,
            "trainable_parameters": self.adapted.trainable_count(),
            "run_dir": str(self.run_dir.path),
        }

    def _take_up(self) -> int:
        """Restore the method and the adapter from finished tasks; return how many there are."""
        places = [unit.place for unit in self.units]
        done = [place for place in places if committed(self.run_dir.task_dir(*place)) is not None]
        if done != places[: len(done)]:
            missing = places[[place in done for place in places].index(False)][1]
            raise RunDirError(
                f"the folder of task {missing} is gone, but later tasks are there",
                "put it back from a copy, or start a new run directory",
            )
        finished = Finished(self.run_dir, done)
        self.method.restore(finished)
        if done:
            self.method.install(finished)
            tree = finished[-1].memory.tree
            if tree is not None and self.world.first:
                write_json(self.run_dir.tree_json, tree.document)
        return len(done)

    def _one_unit(self, unit: Unit, *, trained: bool) -> None:
        if self.run_dir.info.tasks[unit.index]["status"] == "finished":
            return
        began = time.perf_counter()
        train_seconds = 0.0
        if not trained:
            self.matrix.before(unit)
            began_training = time.perf_counter()
            hint = partial(training_hint, self.recipe, self.method, unit.tasks)
            with explaining_shortage(f"training task {unit.task.name}", hint):
                train_seconds = self._train(unit)
            began += time.perf_counter() - began_training
        self._keep_to_budget(unit)
        self.matrix.after(unit)
        self._set_status(unit, "finished")
        seconds = {"train": train_seconds, "evaluate": time.perf_counter() - began}
        if trained:
            del seconds["train"]
        self.emit("task_finished", self._names(unit) | {"seconds": seconds})

    def _first(self, act: Callable[[], None]) -> None:
        """Let the first process do what only one may do; the others wait for it."""
        if self.world.first:
            act()
        self.world.wait()

    def _keep_to_budget(self, unit: Unit) -> None:
        """Merge adapters where there are too many; the method then reads what is left of them.

        A new method takes the place of the old one, as after a resume, so that a run that was
        stopped here and one that was not go on with the same adapters.
        """
        most = self.recipe.storage.max_adapters
        if most is None:
            return
        merged = keep_to(self.run_dir, most, self.recipe.lora) if self.world.first else []
        names = [task.name for task in self.tasks]
        for joined in merged:
            self.emit("merged", {"after": unit.task.name} | joined.to_json(names))
        if self.world.largest(len(merged)):
            self.method = new_method(self.recipe, self.adapted)
            self.method.restore(self._finished(unit))

    def _finished(self, unit: Unit) -> Finished:
        """Return what is stored of the tasks up to a unit."""
        return Finished(self.run_dir, [one.place for one in self.units if one.index <= unit.index])

    def _names(self, unit: Unit) -> dict[str, Any]:
        return {"task": unit.task.name, "tasks": unit.names, "index": unit.index}

    def _set_status(self, unit: Unit, status: str) -> None:
        for member in unit.members:
            self.run_dir.info.tasks[member]["status"] = status
        self._save_info()

    def _train(self, unit: Unit) -> float:
        """Train a unit from its start or its last checkpoint and commit it; return seconds."""
        optim = self.recipe.optim
        seed = derive(self.recipe.stream.seed, "task", *unit.place)
        features = self._read_prompts(unit)
        examples = self._encode(unit)
        rehearsed = self.method.rehearsal(unit.index)
        trains = self.method.trains
        plan = row_plan(unit, self.recipe, seed, len(rehearsed)) if trains else NoPlan()
        pad = self.adapted.backbone.tokenizer.pad_token_id
        rows = [*examples, *rehearsed]
        forwards = Forwards(rows, plan, optim, pad, self.adapted.device.type)
        context = TaskContext(
            *unit.place,
            plan.steps,
            plan.steps_per_epoch,
            seed,
            forwards.per_epoch(),
            probe=partial(first_gradient, self.adapted, forwards, spread=self.world.spread),
            rows=examples,
            ask=Probe(self.adapted, forwards.batches, self.world.spread),
        )
        self._set_status(unit, "training")
        self.method.begin_task(context)
        engine = self.recipe.processes.engine
        trainer = TaskTrainer(
            self.adapted, self.method, context, forwards, optim, self.world, engine
        )
        if optim.carry and trains and unit.previous is not None:
            trainer.carry_on(load_optimizer(self.run_dir, *unit.previous))
        check_shares(forwards, self.world)
        self._resume(trainer)
        started = {
            "of": len(self.tasks),
            "steps": plan.steps,
            "epochs": plan.steps // plan.steps_per_epoch,
            "rows": len(examples),
            "rehearsed": len(rehearsed),
            "truncated": sum(example.truncated for example in examples),
            "from_step": trainer.step,
            "synthetic": any(task.synthetic for task in unit.tasks),
        }
        self.emit("task_started", self._names(unit) | started)
        try:
            if trains:
                trainer.run(partial(self._show_step, trainer), partial(self._after_step, trainer))
            carried = trainer.drive.tensors() if optim.carry else {}
        finally:
            trainer.drive.close()
        memory = self.method.end_task(context)
        document = self._task_document(unit, trainer)
        document["seconds"]["features"] = round(features.seconds, 3)
        form = self.recipe.storage.form
        kept = (document, memory, carried, form, features.tensors)
        self._first(partial(save_task, self.run_dir, self.adapted, *kept))
        # From what is stored, as after a resume: scores must not depend on where a run was stopped.
        self.method.install(self._finished(unit))
        self._set_status(unit, "trained")
        self._first(partial(checkpoints.clear, self.run_dir))
        return trainer.seconds

    def _read_prompts(self, unit: Unit) -> Collected:
        """Read what routing needs; where all tasks share an adapter, nothing."""
        wanted = self.method.mode != "joint"
        count = self.recipe.route.prompts if wanted else 0
        note = f"stopped while reading prompts of task {unit.task.name}"
        eye = Eye(self.adapted, self.recipe.data, partial(self.stop.raise_if_set, note))
        return collect(eye, unit.task, count)

    def _encode(self, unit: Unit) -> list[Example]:
        encoder = build_encoder(self.adapted, self.recipe.data)
        return [
            encoder.example(row.prompt, row.answer, task.separator)
            for task in unit.tasks
            for row in task.splits["train"]
        ]

    def _resume(self, trainer: TaskTrainer) -> None:
        found = checkpoints.newest(self.run_dir)
        self.world.wait()
        if found is None:
            return
        if found.meta.get("index") != trainer.task.index or found.step >= trainer.plan.steps:
            # Left by a kill between a task's commit and the clearing of its checkpoints. Their
            # step numbers would outrank those of this task.
            if self.world.first:
                checkpoints.clear(self.run_dir)
            return
        trainer.resume(found.tensors, found.meta)
        self.emit("resumed", {"task": trainer.task.name, "step": trainer.step})

    def _show_step(self, trainer: TaskTrainer, result: StepResult) -> None:
        self.emit(
            "step",
            {
                "task": trainer.task.name,
                "step": result.step + 1,
                "of": trainer.plan.steps,
                "epoch": trainer.plan.epoch_of(result.step),
                "loss": result.loss,
                "penalty": result.penalty,
                "lr": result.lr,
                "tokens": result.tokens,
                "tokens_per_second": round(trainer.tokens / max(trainer.seconds, 1e-9)),
                **result.info,
            },
        )

    def _after_step(self, trainer: TaskTrainer) -> None:
        if trainer.step == trainer.plan.steps:
            return
        signum = self.stop.asked()
        if signum or trainer.step % self.recipe.stream.checkpoint_steps == 0:
            for result in trainer.drain():
                self._show_step(trainer, result)
            tensors, values = trainer.checkpoint()
            if self.world.first:
                checkpoints.save(self.run_dir, trainer.step, tensors, values)
            self.emit("checkpoint", {"task": trainer.task.name, "step": trainer.step})
        if signum:
            raise Interrupted(
                signum,
                f"stopped in task {trainer.task.name} after step {trainer.step} of "
                f"{trainer.plan.steps}; the state is saved in {self.run_dir.path}",
            )

    def _task_document(self, unit: Unit, trainer: TaskTrainer) -> dict[str, Any]:
        return facts(unit, self.recipe) | {
            "index": unit.index,
            "steps": trainer.plan.steps,
            "seed": trainer.task.seed,
            "answers_with": [
                *([ADAPTER] if self.adapted.live_parameters else []),
                *([WEIGHTS_FILE] if self.adapted.more_parameters else []),
            ],
            "seconds": {"train": round(trainer.seconds, 3)},
            "trainable_parameters": self.adapted.trainable_count(),
            "tokens": trainer.tokens,
            **({} if self.method.trains else {"epochs": 0}),
        }
