"""``treelora bench``: measure on this machine what the README says of speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treelora_cli.cli import output
from treelora_cli.errors import RunDirError, UsageError, did_you_mean

if TYPE_CHECKING:
    from treelora_cli.bench.document import Document

FORMATS = ("text", "md", "json")
ABLATION = "Ablation"
SUFFIXES = {".txt": "text", ".md": "md", ".json": "json"}


Parts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[step|tasks|data|eval|tree|startup|curves|scale|ablation|all]...",
        help="What to measure; all but scale and ablation if nothing is named.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A first look: tiny shapes, seconds a part, no result.")
]
Repeat = Annotated[
    int | None,
    typer.Option(min=1, help="Repetitions of every measurement, in place of a part's own."),
]
Methods = Annotated[
    str | None, typer.Option(metavar="A,B", help="The methods of step; all if not given.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Your own tasks: their rows' lengths for data and eval (TRACE's come along), the "
        "tasks that ablation trains on. With --model.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="ID|DIR", help="Hub id or folder: its tokenizer counts; ablation's base."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, tokens, signatures and bootstrap.")]
Recipe = Annotated[
    str, typer.Option(help="ablation: recipe of every run.", rich_help_panel=ABLATION)
]
Seeds = Annotated[
    str, typer.Option(metavar="1,2,3", help="ablation: seeds.", rich_help_panel=ABLATION)
]
Split = Annotated[
    str,
    typer.Option(
        metavar="eval|test",
        help="ablation: rows that are scored. Choose settings on eval, report on test.",
        rich_help_panel=ABLATION,
    ),
]
Folder = Annotated[Path, typer.Option(help="ablation: the runs' folder.", rich_help_panel=ABLATION)]
Settings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="ablation: YAML, name: list of key=value; a list comes along.",
        rich_help_panel=ABLATION,
    ),
]
Only = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="ablation: only these settings.", rich_help_panel=ABLATION),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Write here instead of standard output; the suffix chooses the format (.md, .json, "
        ".txt)."
    ),
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="text|md|json", help="The format of results.")
]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.")]


def bench(
    parts: Parts = None,
    device: Device = "auto",
    quick: Quick = False,
    repeat: Repeat = None,
    methods: Methods = None,
    data: Data = None,
    model: Model = None,
    seed: Seed = 0,
    recipe: Recipe = "trace-small",
    seeds: Seeds = "1,2,3",
    split: Split = "eval",
    folder: Folder = Path("ablation"),
    settings: Settings = None,
    only: Only = None,
    out: Out = None,
    format_: Format = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory here: every such number in the README is made by it.

    Models have random weights, the earlier tasks' signatures are synthetic; on a
    GPU the shape is that of Llama-3.2-1B. What is compared runs alternately in
    one process, the order flipped with every pair; a ratio is the median over
    pairs, with its 95 % bootstrap interval.

    step: an optimizer step of every method over plain PEFT. tasks: step and
    memory with 1 to 10,000 earlier tasks. data: training over rows of real
    lengths beside one row a forward pass. eval: answers in batches beside one
    at a time. tree: cost of the gradient tree, and what its search gains.
    startup: whole commands. curves: step, memory and storage of models that grow,
    beside the formulas that scale extends to 70B; scale itself times nothing.

    On one CPU core all of it takes some fifteen minutes; for steady numbers let
    nothing else run, and set OMP_NUM_THREADS to cores that are free.

    ablation trains: each switch of treelora alone, and its rivals, on real tasks
    with several seeds. Every run is an ordinary run directory in --folder; the
    same command goes on with what is missing, also from a second terminal.

    [bold]treelora bench step --methods treelora,seqlora --format md[/bold]

    [bold]treelora bench ablation --model BASE --data TRACE --format md[/bold]
    """
    chosen = _format(format_, as_json, out)
    if (data is None) != (model is None):
        raise UsageError(
            "--data and --model go together: the model's tokenizer counts the data's lengths",
            "give both, or neither for the lengths that come along",
        )
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}", "create it first")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder", "name a file in it, such as bench.md")
    from treelora_cli.bench.part import Plan
    from treelora_cli.bench.parts import choose, measure
    from treelora_cli.models.backbone import choose_device

    wanted = choose(parts or [])
    plan = Plan(
        choose_device(device),
        quick,
        seed,
        repeat,
        _names(methods),
        data,
        model,
        recipe=recipe,
        seeds=_numbers(seeds),
        split=_split(split),
        folder=folder,
        settings=settings,
        only=_names(only),
    )
    document = measure(wanted, plan, _say)
    if out is None:
        _print(chosen, document)
        return
    try:
        _write(chosen, document, out)
    except RunDirError as error:
        raise UsageError(error.message, "choose another place with --out") from error
    _say(f"wrote {out} ({chosen})")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name for name in text.split(",") if name)


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UsageError(f"--seeds {text}: not a list of whole numbers", "e.g. --seeds 1,2,3")
    return tuple(int(part) for part in text.split(","))


def _split(text: str) -> str:
    if text not in ("eval", "test"):
        raise UsageError(f"unknown split {text!r}", "use eval or test")
    return text


def _format(wanted: str | None, as_json: bool, out: Path | None) -> str:
    """Return the format: the one asked for, else that of the file's suffix, else text.

    Raises:
        UsageError: it is unknown, or two are asked for.
    """
    if as_json and wanted not in (None, "json"):
        raise UsageError(f"--json and --format {wanted} ask for two formats", "give one of them")
    by_suffix = "text" if out is None else SUFFIXES.get(out.suffix.lower())
    chosen = "json" if as_json else wanted or by_suffix
    if chosen is None:
        raise UsageError(
            f"--out {out}: the suffix says no format", f"--format {', '.join(FORMATS)}"
        )
    if chosen not in FORMATS:
        raise UsageError(f"unknown format {chosen!r}", did_you_mean(chosen, list(FORMATS)))
    return chosen


def _say(line: str) -> None:
    output.stderr().print(line, markup=False, soft_wrap=True)


def _print(chosen: str, document: Document) -> None:
    from treelora_cli.bench.document import FORMS, to_json

    if chosen == "json":
        output.print_json(to_json(document))
    else:
        output.write_out(FORMS[chosen](document).removesuffix("\n"))


def _write(chosen: str, document: Document, out: Path) -> None:
    from treelora_cli.bench.document import FORMS, to_json
    from treelora_cli.rundir.atomic import write_file, write_json

    if chosen == "json":
        write_json(out, {"schema_version": output.SCHEMA_VERSION, **to_json(document)})
    else:
        write_file(out, FORMS[chosen](document))
