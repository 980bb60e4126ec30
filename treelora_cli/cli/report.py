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
        typer.Argument(metavar="RUN", help="Run directories; several are compared."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write here instead of standard output; the suffix chooses the format "
            "(.html, .md, .json, .txt)."
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", metavar="html|md|json|text", help="The format of the report."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show OP, BWT, FWT, forgetting and every score of a run, while it trains or afterwards.

    Only full test scores in the method's own adapter mode count; what they do not cover is empty.
    """
    from treelora_cli.report.collect import collect
    from treelora_cli.report.formats import choose

    if as_json and format_ not in (None, "json"):
        raise UsageError(f"--json and --format {format_} ask for two formats", "give one of them")
    chosen = choose("json" if as_json else format_, out)
    reports = [collect(run) for run in runs]
    if out is None:
        _print(chosen, reports)
        return
    try:
        _write(chosen, reports, out)
    except RunDirError as error:
        raise UsageError(error.message, "choose another place with --out") from error
    plural = "run" if len(reports) == 1 else "runs"
    output.stderr().print(
        f"wrote {out} ({chosen}, {len(reports)} {plural})", markup=False, soft_wrap=True
    )


def _print(chosen: str, reports: list[RunReport]) -> None:
    if chosen == "json":
        from treelora_cli.report.document import document

        output.print_json(document(reports))
    elif chosen == "text":
        from treelora_cli.report.text import renderable

        console = output.stdout()
        console.print(renderable(reports, console.width), soft_wrap=False, crop=False)
    else:
        page = _page(chosen, reports)
        output.stdout().print(page, markup=False, soft_wrap=True, end="", emoji=False)


def _write(chosen: str, reports: list[RunReport], out: Path) -> None:
    from treelora_cli.rundir.atomic import write_file, write_json

    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}", "create it first")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", "name a file in it, such as report.html")
    if chosen == "json":
        from treelora_cli.report.document import document

        write_json(out, {"schema_version": output.SCHEMA_VERSION, **document(reports)})
    else:
        write_file(out, _page(chosen, reports))


def _page(chosen: str, reports: list[RunReport]) -> str:
    if chosen == "html":
        from treelora_cli.report.html import html

        return html(reports)
    if chosen == "md":
        from treelora_cli.report.markdown import markdown

        return markdown(reports)
    from treelora_cli.report.text import text

    return text(reports)
