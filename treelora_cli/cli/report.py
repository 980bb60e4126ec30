"""``treelora report``: what one run achieved, or several compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treelora_cli.cli import output
from treelora_cli.errors import RunDirError, UsageError

if TYPE_CHECKING:
    from treelora_cli.report.measure import Progress
    from treelora_cli.report.model import RunReport


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run directories, or folders of them; several runs are compared, and those that "
            "differ only in the seed are taken together.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write here instead of standard output; the suffix chooses the format "
            "(.html, .md, .json, .csv, .tex, .txt)."
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="html|md|json|csv|latex|text", help="The format of the report."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    evidence: Annotated[
        bool,
        typer.Option(
            "--evidence",
            help="Compare what each task added to the weights: collision, orthogonality and "
            "nuclear norm (N-LoRA). Reads every adapter: seconds, for large models minutes.",
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--evidence-threshold",
            metavar="X",
            help="--evidence where an entry counts as changed above X of the root mean square of "
            "its task's change (0.1; those below hold less than X² of the squared norm; 0 counts "
            "all that are not exactly 0).",
        ),
    ] = None,
) -> None:
    """Show OP, BWT, FWT, forgetting and every score of a run, while it trains or afterwards.

    Only full test scores in the method's own adapter mode count; what they do not cover is empty.

    Runs that differ only in the seed: mean ± sample standard deviation (n - 1).

    CSV is one table in long form for pandas.read_csv. Its column kind tells rows
    apart: score (one cell of R), number and op_curve of a run; group_number,
    group_op_curve and group_final over seeds, with std and n. Scores are 0-1;
    after_index 0 is zero shot; text that a spreadsheet would run as a formula
    starts with a quote. R of one run: read_csv("r.csv").query("kind == 'score'")
    .pivot(index="after_index", columns="task", values="score").
    With --evidence also evidence (of a task) and evidence_pair (task and other).

    LaTeX is tables for an article with the package booktabs; bold is best.

    [bold]treelora report run-tree run-seq --out compare.html[/bold]

    [bold]treelora report sweep --out scores.csv[/bold]
    """
    from treelora_cli.report.collect import collect
    from treelora_cli.report.formats import choose
    from treelora_cli.report.selection import select

    if as_json and format_ not in (None, "json"):
        raise UsageError(f"--json and --format {format_} ask for two formats", "give one of them")
    chosen = choose("json" if as_json else format_, out)
    _check(threshold)
    selection = select(runs)
    reports = [collect(run) for run in selection.runs]
    if evidence or threshold is not None:
        reports = _with_evidence(selection.runs, reports, threshold)
    if out is None:
        _print(chosen, reports, selection.from_folder)
        return
    try:
        _write(chosen, reports, out, selection.from_folder)
    except RunDirError as error:
        raise UsageError(error.message, "choose another place with --out") from error
    plural = "run" if len(reports) == 1 else "runs"
    output.stderr().print(
        f"wrote {out} ({chosen}, {len(reports)} {plural})", markup=False, soft_wrap=True
    )


def _check(threshold: float | None) -> None:
    """Refuse a threshold under which nothing could be counted; true of nan too."""
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise UsageError(
            f"--evidence-threshold {threshold:g} is no threshold",
            "give 0 or a positive number, such as 0.1",
        )


def _with_evidence(
    runs: Sequence[Path], reports: Sequence[RunReport], threshold: float | None
) -> list[RunReport]:
    """Compare the tasks' parts in every run, showing on stderr how far it is."""
    from treelora_cli.report.measure import measure

    measured = []
    for run, report in zip(runs, reports, strict=True):
        with _progress(report.path) as progress:
            measured.append(replace(report, evidence=measure(run, threshold, progress)))
    return measured


@contextmanager
def _progress(run: str) -> Iterator[Progress]:
    """Show a bar on a terminal, and elsewhere a line when a part of the work is done."""
    import rich.progress

    console = output.stderr()
    if not console.is_terminal:

        def say(what: str, done: int, of: int) -> None:
            if done == of:
                console.print(f"{run}: {of} {what}", markup=False)

        yield say
        return
    with rich.progress.Progress(console=console, transient=True) as bars:
        bar = bars.add_task("")

        def move(what: str, done: int, of: int) -> None:
            bars.update(bar, description=what, completed=done, total=of)

        yield move


def _print(chosen: str, reports: list[RunReport], listed: bool) -> None:
    if chosen == "json":
        from treelora_cli.report.document import document

        output.print_json(document(reports, listed))
    elif chosen == "text":
        from treelora_cli.report.text import renderable

        console = output.stdout()
        console.print(renderable(reports, console.width), soft_wrap=False, crop=False)
    else:
        output.write_out(_page(chosen, reports).removesuffix("\n"))


def _write(chosen: str, reports: list[RunReport], out: Path, listed: bool) -> None:
    from treelora_cli.rundir.atomic import write_file, write_json

    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}", "create it first")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", "name a file in it, such as report.html")
    if chosen == "json":
        from treelora_cli.report.document import document

        write_json(out, {"schema_version": output.SCHEMA_VERSION, **document(reports, listed)})
    else:
        write_file(out, _page(chosen, reports))


def _page(chosen: str, reports: list[RunReport]) -> str:
    if chosen == "html":
        from treelora_cli.report.html import html

        return html(reports)
    if chosen == "csv":
        from treelora_cli.report.csvtable import csv_table

        return csv_table(reports)
    if chosen == "latex":
        from treelora_cli.report.latex import latex

        return latex(reports)
    if chosen == "md":
        from treelora_cli.report.markdown import markdown

        return markdown(reports)
    from treelora_cli.report.text import text

    return text(reports)
