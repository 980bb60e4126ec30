"""``treelora report``: what one run achieved, or several compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treelora_cli.cli import output
from treelora_cli.errors import RunDirError, UsageError

if TYPE_CHECKING:
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

    LaTeX is two tables for an article with the package booktabs; bold is best.

    [bold]treelora report run-tree run-seq --out compare.html[/bold]

    [bold]treelora report sweep --out scores.csv[/bold]
    """
    from treelora_cli.report.collect import collect
    from treelora_cli.report.formats import choose
    from treelora_cli.report.selection import select

    if as_json and format_ not in (None, "json"):
        raise UsageError(f"--json and --format {format_} ask for two formats", "give one of them")
    chosen = choose("json" if as_json else format_, out)
    selection = select(runs)
    reports = [collect(run) for run in selection.runs]
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
