"""What every method is: a few hooks that the engine calls around one task's training.

The engine knows no method by name. A method chooses how the adapter starts, may add a penalty to
the loss or change gradients, and says what to store when a task ends and which adapter answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import Backbone
from treelora_cli.models.encode import Batch, Example
from treelora_cli.models.probe import Probe
from treelora_cli.models.snapshot import WEIGHTS, Snapshot
from treelora_cli.recipe import (
    BanditSection,
    DataSection,
    LoraSection,
    Recipe,
    Section,
    TreeSection,
    validation_problem,
)
from treelora_cli.tasks.types import Task

Need = Literal["penalty", "gradients", "weights"]
Mode = Literal["latest", "own", "joint", "route"]
Answer = Literal["adapter", "sum", "more"]

EFFECT = "effect"
"""The key of a step's event that says how much a method that has no penalty did in that step: the
norm of what a projection took away, or how many stored rows were read."""


class MethodSettings(Section):
    """A method's own settings in the recipe's ``method`` section; none by default."""


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What a method may know of the stream before any task.

    Attributes:
        seed: the run's seed.
        bandit: the recipe's ``bandit`` section.
        tree: the recipe's ``tree`` section.
        lora: the recipe's ``lora`` section.
        data: the recipe's ``data`` section.
    """

    seed: int
    bandit: BanditSection
    tree: TreeSection
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)


def _no_gradients(what: object) -> list[Tensor]:
    raise RuntimeError("this context was made without a model to take gradients of")


def _no_rows(rows: Sequence[Example]) -> list[Batch]:
    raise RuntimeError("this context was made without a model to ask")


def _no_probe() -> Probe:
    model: Any = None
    return Probe(model, _no_rows)


@dataclass(frozen=True, slots=True)
class TaskContext:
    """The task about to be trained.

    Attributes:
        index: its place in the stream, from 0.
        name: its name.
        steps: optimizer steps it will be trained for.
        steps_per_epoch: optimizer steps in one pass over its rows.
        seed: differs between tasks; the same whenever this task is trained in this run.
        forwards_per_epoch: forward passes (micro-batches) in one pass over its rows.
        probe: given K, the mean gradient of the first K steps' rows at the live weights: one
            tensor for each of the model's trainable parameters. Nothing is trained by it.
        rows: its training rows, tokenised, in the order of the data.
        ask: losses and gradients of any rows, these or stored ones.
    """

    index: int
    name: str
    steps: int
    steps_per_epoch: int
    seed: int
    forwards_per_epoch: int = 0
    probe: Callable[[int], list[Tensor]] = _no_gradients
    rows: Sequence[Example] = ()
    ask: Probe = field(default_factory=_no_probe)


@dataclass(frozen=True, slots=True)
class StepContext:
    """One optimizer step, or one forward pass of it where a method asks for each.

    Attributes:
        step: from 0, over all epochs of the task.
        loss: the task loss, a detached float32 scalar (mean over answer tokens), of the step or of
            this forward pass alone.
        forward: the forward pass within the step, from 0.
        forwards: forward passes in this step.
        gradient_under: the gradient of this step's rows at a snapshot's weights: one tensor for
            each trainable parameter. Costs one more forward and backward pass.
        batch: what this forward pass read, on the device; only with ``per_forward``.
        logits: [n, vocabulary] where its answers are predicted, in the graph and in the order of
            ``batch.labels``; only with ``per_forward``.
    """

    step: int
    loss: Tensor
    forward: int = 0
    forwards: int = 1
    gradient_under: Callable[[Snapshot], list[Tensor]] = _no_gradients
    batch: Batch | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TreeRecord:
    """The gradient tree after a task, and the tensors that this task adds to it."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TaskMemory:
    """What a method wants kept of a finished task, beside the adapter.

    Attributes:
        tensors: stored with the task as ``method.safetensors``.
        info: JSON values, shown in reports.
        tree: the tree after this task, for methods that grow one.
        reference: earlier tasks whose mean adapter (``mean_snapshot``) this one is equal to in
            many entries, so that storing the difference is cheap; empty: none.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    tree: TreeRecord | None = None
    reference: tuple[int, ...] = ()


def _no_adapter() -> Snapshot:
    raise RuntimeError("this stored task was made without its adapter")


@dataclass(frozen=True, slots=True)
class StoredTask:
    """A finished task as read back from the run directory, in stream order.

    Attributes:
        index: its place in the stream.
        name: its name.
        memory: what the method stored of it.
        adapter: reads the adapter it left, for methods that need it.
    """

    index: int
    name: str
    memory: TaskMemory
    adapter: Callable[[], Snapshot] = _no_adapter


def stored_tree(task: StoredTask) -> TreeRecord:
    """Return what a tree-growing method stored of a task.

    Raises:
        RunDirError: its tree is missing.
    """
    record = task.memory.tree
    if record is None:
        raise RunDirError(
            f"task {task.name} has no tree in the run directory",
            "put tree/history back, or start a new run",
        )
    return record


class Departure(NamedTuple):
    """One thing in which a paper, its released code and this program are not the same.

    Attributes:
        what: the thing, in a few words.
        paper: what the paper says.
        released: what the released code does.
        here: what this program does.
    """

    what: str
    paper: str
    released: str
    here: str


class Method:
    """A continual-learning method.

    Attributes:
        name: as written in recipes and on the command line.
        needs: what it asks of a training step: a ``penalty`` on the loss, ``gradients`` that it
            reads or changes, ``weights`` that it writes between steps. An engine that cannot give
            it refuses at start. Of the class, unless a setting decides it.
        mode: whose adapter answers when scores are taken: ``latest``, or each task's ``own``;
            ``joint``: all tasks are trained at once, and the one adapter answers; ``route``: each
            prompt is sent to the task it looks like, and that task's adapter answers. Of the class,
            unless a setting decides it.
        answer: what answers: the live ``adapter``, stored by itself; the ``sum`` of all tasks'
            adapters, which is one LoRA whose rank grows; or ``more`` than a LoRA.
        trains: False where nothing is learned, so that no step is made.
        Settings: its own settings.
        per_forward: True for a penalty of every forward pass instead of every optimizer step.
        departures: where paper, released code and this program differ, for ``treelora methods``.
    """

    name: ClassVar[str]
    needs: frozenset[Need] = frozenset()
    mode: Mode = "latest"
    answer: ClassVar[Answer] = "adapter"
    trains: ClassVar[bool] = True
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    per_forward: ClassVar[bool] = False
    departures: ClassVar[tuple[Departure, ...]] = ()

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    @classmethod
    def build(cls, backbone: Backbone, lora: LoraSection, seed: int) -> AdaptedModel:
        """Return the model the method trains: a backbone with a LoRA adapter, if not overridden.

        Raises:
            UsageError: the adapter does not fit the model.
        """
        return AdaptedModel(backbone, lora, seed)

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Meet the model; called once, before any task. Parts of its own are added to it here."""
        self.stream = stream
        self.model = model

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Take up what earlier tasks left, after a resume or when a stream is extended."""

    def install(self, finished: Sequence[StoredTask]) -> None:
        """Bring the model to the state that answers after the last of these tasks.

        Called when a task has been stored, before it is scored; after ``restore``; and when a run
        is scored again, then on a method that has only been started. The next task goes on from
        this state. The default puts the last task's adapter, and what belongs to it, into the
        model.

        Args:
            finished: the stored tasks in stream order, at least one; each is read when it is
                looked at.
        """
        self.model.restore(finished[-1].adapter())

    def rehearsal(self, index: int) -> Sequence[Example]:
        """Return rows to train on after a task's own, once each; called before ``begin_task``.

        Args:
            index: the task's place in the stream.
        """
        return ()

    def rate(self, key: str) -> float:
        """Return by what a trainable parameter's learning rate is multiplied.

        Args:
            key: its key in a snapshot.
        """
        return 1.0

    def rehearsal_size(self, earlier: Sequence[int]) -> int:
        """Return how many rows ``rehearsal`` will give, for plans made before there are any.

        Args:
            earlier: training rows of every earlier task.
        """
        return 0

    def learns(self, key: str) -> bool:
        """Tell whether a LoRA matrix or a base weight is trained, for plans made without a model.

        Args:
            key: its key in a snapshot, that of a base weight after ``weights.``.
        """
        return self.trains and not key.startswith(WEIGHTS)

    def begin_task(self, task: TaskContext) -> None:
        """Choose how the adapter starts. The default goes on from the last task's weights."""

    def before_forward(self, batch: Batch) -> None:
        """See a batch before the forward pass that trains on it; weights may be exchanged here."""

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return a scalar to add to the task loss, or None.

        Called once an optimizer step, before the last backward pass; with ``per_forward`` in every
        forward pass, and what is returned then counts with that pass's share of the step's answer
        tokens, as its loss does.
        """
        return None

    def after_backward(self, step: StepContext) -> None:
        """Change gradients, before clipping; called once an optimizer step."""

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Observe the new weights; what is returned goes into the step's event.

        Numbers that the device still works on are returned as ``Readback``: reading them here
        would make the host wait.
        """
        return {}

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Say what to keep of the finished task, and remember it for the next one."""
        return TaskMemory()

    def questions(self, task: Task, prompts: Sequence[str]) -> list[str]:
        """Return what a task's prompts are asked as; the base's zero-shot scores ask them as is."""
        return list(prompts)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint inside the task needs: tensors and JSON values."""
        return {}, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint's state; called after ``begin_task``."""


def build_method(recipe: Recipe) -> Method:
    """Return the recipe's method with its settings checked.

    Raises:
        UsageError: unknown method, or a setting it does not have or does not accept.
    """
    from treelora_cli.methods import registry

    kind = registry().get(recipe.method.name)
    try:
        return kind(kind.Settings.model_validate(recipe.method.settings))
    except ValidationError as error:
        raise validation_problem(error, kind.Settings, f"method {kind.name}") from None
