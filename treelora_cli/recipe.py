"""The recipe: every setting of a run, typed, checked and told apart by name.

A recipe is a YAML file with the sections ``model, stream, data, optim, lora, method, bandit, tree,
storage, route, eval``. Later layers win: defaults, recipe file, ``--set section.key=value``, flags.
The ``method`` section holds the method's name and that method's own settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treelora_cli.errors import UsageError, did_you_mean

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelSection(Section):
    """The backbone and how it is loaded."""

    name: str | None = Field(None, description="hub id or folder; nothing: the built-in base")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 on a GPU that has it"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: flash_attention_2 if installed and on CUDA, else the model's best",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="the base's linear layers in 4 or 8 bits, by bitsandbytes; model.dtype is then "
        "that of the rest and of the computing",
    )


class StreamSection(Section):
    """Which tasks arrive, in which order, under which seed."""

    tasks: tuple[str, ...] = Field((), description="task names in the order of their arrival")
    seed: int = Field(1234, ge=0, lt=2**31, description="decides order, dropout, start and bandit")
    checkpoint_steps: Positive = Field(100, description="optimizer steps between checkpoints")


class DataSection(Section):
    """Where rows come from and how long they may be."""

    path: str | None = Field(
        None, description="folder of tasks, one file, or hf:ORG/NAME; nothing: the built-in ones"
    )
    format: Literal["plain", "chat"] = Field(
        "plain", description="prompts as they are, or in the tokenizer's chat template"
    )
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are cut")
    max_answer_tokens: Positive = Field(
        512, description="longer answers are cut; also caps each task's own length when asked"
    )
    truncate: Literal["left", "middle"] = Field(
        "left", description="which part of a long prompt goes: its beginning, or its middle"
    )
    train_rows: Positive | None = Field(None, description="train rows a task; nothing: all")
    test_rows: Positive | None = Field(None, description="rows a test split; nothing: all")


class OptimSection(Section):
    """The optimizer: AdamW, a new one per task unless ``carry`` is set."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    epochs: Positive | dict[str, Positive] = Field(1, description="a number, or task: number")
    batch_size: Positive = Field(32, description="rows an optimizer step")
    micro_batch_size: Positive = Field(32, description="most rows a forward pass")
    micro_batch_tokens: Positive | Literal["auto"] | None = Field(
        "auto",
        description="most tokens a forward pass, padding counted; a step's rows are grouped by "
        "length into as many passes as that takes, and their gradients add up; auto: 1024 on CPU, "
        "where larger passes only fill the memory, 16384 on a GPU; nothing: no limit",
    )
    packing: bool = Field(
        False,
        description="a forward pass reads its rows as one sequence without padding; each row sees "
        "itself alone",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="keep each layer's input only and compute the layer again in the backward "
        "pass: much less memory, about a third more time, the same gradients",
    )
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: Fraction = Field(0.0, description="share of lr left at the end of a task")
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="global norm; 0: none")
    carry: bool = Field(
        False, description="go on with the last task's moments; they are then stored per task"
    )


class LoraSection(Section):
    """The adapter, in PEFT's terms."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: Literal["auto", "all-linear"] | tuple[str, ...] = Field(
        "auto", description="auto: PEFT's choice for the architecture, else query and value"
    )


class MethodSection(Section):
    """The method's name; its own settings stand beside it and are checked by the method."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "treelora"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings, unchecked."""
        return dict(self.model_extra or {})


class BanditSection(Section):
    """The search for the task to compare with (design of TreeLoRA, Eq. 2)."""

    search: Literal["tree", "flat", "random", "exhaustive"] = "tree"
    scope: Literal["model", "block"] = Field("model", description="one search, or one per block")
    c: Annotated[float, Field(ge=0)] = Field(1.0, description="width of the bound; the paper: 2")
    delta: Literal["observed", "median", "bound"] = Field(
        "observed", description="smoothness of a node: as observed, the paper's, a true bound"
    )


class TreeSection(Section):
    """How the gradient tree splits groups of tasks."""

    split: Literal["principal", "paper", "official"] = "principal"
    block: Literal["spread", "index"] = "spread"
    rebuild: Literal["auto", "always", "unbalanced"] = Field(
        "auto",
        description="a new task: built anew up to 256 tasks, then inserted; always built anew; "
        "always inserted, and rebuilt where out of balance",
    )


class StorageSection(Section):
    """How finished tasks' adapters are kept."""

    form: Literal["dense", "delta"] = Field(
        "dense",
        description="delta: a task whose method leaves most entries equal to earlier adapters "
        "(treelora with method.form=proximal) is stored as the entries that differ, where that is "
        "smaller; it reads back bit for bit",
    )
    max_adapters: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="most adapters kept, the newest included, which is never merged; beyond it the "
        "two nearest are merged into the mean of their weight changes; nothing: no limit",
    )


class RouteSection(Section):
    """How a prompt finds the adapter of the task it looks like, where nobody names the task."""

    prompts: Annotated[int, Field(ge=0)] = Field(
        200,
        description="training prompts a task whose features are read by the base before training, "
        "for `treelora eval --adapter route`; only their mean and scatter are kept; 0: none",
    )
    threshold: Fraction = Field(
        0.0,
        description="prompts less typical of their nearest task than this are answered by the base "
        "alone; 0: none",
    )


class EvalSection(Section):
    """When and how tasks are scored."""

    when: Literal["all", "ends", "last", "none"] = Field(
        "all",
        description="all tasks so far after every task; each when it is learned and all after the "
        "last, which is enough for OP and BWT; all after the last only; never",
    )
    split: Literal["test", "eval"] = Field(
        "test", description="the rows that are scored; settings are chosen on eval"
    )
    scoring: Literal["greedy", "likelihood"] = Field(
        "greedy",
        description="generate every answer, or take the likeliest label where a task has a closed "
        "set of them",
    )
    batch_size: Positive = Field(64, description="most rows a batch; changes no score")
    batch_tokens: Positive | None = Field(
        32768,
        description="most tokens a batch, padding and the longest answer counted; changes no "
        "score; nothing: no limit",
    )
    zero_shot: bool = Field(True, description="score each task before any training (for FWT)")
    before: bool = Field(True, description="score each task just before its training (for FWT)")


class ProcessesSection(Section):
    """How several processes train together; how many there are is said when they are started."""

    engine: Literal["ddp", "zero1", "zero2", "fsdp2"] = Field(
        "ddp",
        description="torch's DistributedDataParallel; DeepSpeed's ZeRO 1 or 2, which share out the "
        "optimizer's state (and gradients), for methods that need no gradients of a step; or "
        "torch's FSDP2, which shares out the frozen base, for methods that leave it alone",
    )


class Recipe(Section):
    """All settings of a run."""

    model: ModelSection = ModelSection()
    stream: StreamSection = StreamSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    lora: LoraSection = LoraSection()
    method: MethodSection = MethodSection()
    bandit: BanditSection = BanditSection()
    tree: TreeSection = TreeSection()
    storage: StorageSection = StorageSection()
    route: RouteSection = RouteSection()
    eval: EvalSection = EvalSection()
    processes: ProcessesSection = ProcessesSection()
    limit: Positive | None = Field(
        None, description="a quick look: so many train and evaluation rows a task"
    )

    def epochs_of(self, task: str) -> int:
        """Return a task's epochs.

        Raises:
            UsageError: ``optim.epochs`` lists epochs by task and this task is not among them.
        """
        epochs = self.optim.epochs
        if isinstance(epochs, int):
            return epochs
        if task not in epochs:
            raise UsageError(
                f"optim.epochs has no entry for task {task!r}",
                f"add it in the recipe, or give one number for all: --set optim.epochs=1 "
                f"(listed: {', '.join(epochs)})",
            )
        return epochs[task]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and YAML values, every key written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML that loads to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets a second mention of a key win silently."""


def _mapping_with_unique_keys(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_UniqueKeyLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_with_unique_keys
)


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Args:
        text: the document.
        where: what to call it in messages.

    Raises:
        UsageError: not YAML, a key stands twice, or the document is not a mapping.
    """
    try:
        document = _UniqueKeyLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{place}: not a valid recipe: {problem}", "mend the YAML there") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{where}: a recipe is a mapping of sections", "see `treelora recipes`")
    return document


def recipe_folders() -> list[Path]:
    """Return the folders that hold named recipes: packed with the wheel, or in a checkout."""
    here = Path(__file__).resolve().parent
    return [folder for folder in (here / "_recipes", here.parent / "recipes") if folder.is_dir()]


def recipe_names() -> list[str]:
    """Return the names of all recipes that come with treelora."""
    return sorted({path.stem for folder in recipe_folders() for path in folder.rglob("*.yaml")})


def find_recipe(name: str) -> Path:
    """Find a recipe by path or by the name of one that comes with treelora.

    Raises:
        UsageError: neither a file nor a known name.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if path.is_file():
            return path
        raise UsageError(
            f"recipe file {name!r} does not exist", f"by name: {', '.join(recipe_names())}"
        )
    for folder in recipe_folders():
        for found in sorted(folder.rglob(f"{name}.yaml")):
            return found
    raise UsageError(f"unknown recipe {name!r}", did_you_mean(name, recipe_names()))


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Turn ``section.key=value`` texts into nested values; values are read as YAML.

    Raises:
        UsageError: a text without ``=`` or without a key.
    """
    document: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UsageError(
                f"--set {pair!r} is not of the form section.key=value", "e.g. --set optim.lr=1e-4"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {pair!r}: the value is not valid YAML", "quote it") from None
        merge(document, _nested(parts, value))
    return document


def _nested(parts: list[str], value: Any) -> dict[str, Any]:
    for part in reversed(parts):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Put ``top`` over ``base`` in place, section by section; values and lists are replaced."""
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key != "epochs":
            merge(base[key], value)
        else:
            base[key] = value
    return base


def build_recipe(document: dict[str, Any], where: str) -> Recipe:
    """Check a document and return the recipe.

    Args:
        document: sections as plain values.
        where: what to call the source in messages.

    Raises:
        UsageError: an unknown key (with the closest known one) or a value out of range.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise validation_problem(error, Recipe, where) from None


def validation_problem(error: ValidationError, model: type[BaseModel], where: str) -> UsageError:
    """Turn pydantic's first complaint into one clear line.

    Args:
        error: what pydantic raised.
        model: the model that was being checked; its fields feed the did-you-mean hint.
        where: what to call the source in the message.
    """
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return UsageError(f"{where}: unknown key {key!r}", did_you_mean(location[-1], known))
    message = first["msg"].removeprefix("Value error, ")
    got = f", got {first['input']!r}" if not isinstance(first["input"], dict) else ""
    text = f"{where}: {key}: {message}{got}" if key else f"{where}: {message}"
    return UsageError(text, "correct the value in the recipe or in --set")


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return sorted(field.alias or name for name, field in model.model_fields.items())


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List ``key: old -> new`` for settings that differ and would change a run's meaning.

    The tasks may grow, and the places of model and data may move: their contents are compared by
    fingerprint elsewhere. What spares memory may change, so that a run that was out of it can go
    on: how a step's rows are spread over passes is seen by rounding, by dropout's draws and by
    methods that count passes.
    """
    free = {"stream.tasks", "model.name", "data.path", "eval.batch_size", "eval.batch_tokens"}
    free |= {"storage.form", "route.prompts", "route.threshold", "processes.engine"}
    free |= {"optim.gradient_checkpointing", "optim.micro_batch_size", "optim.micro_batch_tokens"}
    left, right = _flat(old.to_dict()), _flat(new.to_dict())
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if key not in free and left.get(key) != right.get(key)
    ]


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
