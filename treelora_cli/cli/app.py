"""The `treelora` command: its sub-commands, and the one place where errors become exit codes."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from treelora_cli import __version__
from treelora_cli.cli import builtin, tree
from treelora_cli.cli.bench import bench
from treelora_cli.cli.eval import evaluate
from treelora_cli.cli.export import export
from treelora_cli.cli.launch import hold_lifeline, leave, rank
from treelora_cli.cli.logs import set_up_logging
from treelora_cli.cli.merge import merge
from treelora_cli.cli.methods import methods
from treelora_cli.cli.output import SCHEMA_VERSION, stderr
from treelora_cli.cli.prepare import prepare
from treelora_cli.cli.recipes import recipes
from treelora_cli.cli.report import report
from treelora_cli.cli.train_stream import train_stream
from treelora_cli.errors import TreeloraError

EPILOG = (
    "Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 2 wrong usage or "
    "recipe, 3 bad data or model, 4 run directory missing or damaged, 5 run directory busy, "
    "6 something the machine lacks, 7 training diverged, 129/130/143 interrupted (resumable)."
)

app = typer.Typer(
    name="treelora",
    help="Teach a language model task after task with LoRA, without it forgetting.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare")(prepare)
app.command("train-stream")(train_stream)
app.add_typer(tree.app, name="tree")
app.command("eval")(evaluate)
app.command("report")(report)
app.command("merge")(merge)
app.command("export")(export)
app.command("methods")(methods)
app.command("recipes")(recipes)
app.command("bench")(bench)
app.add_typer(builtin.app, name="builtin")


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"treelora {__version__}\n")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with every error.")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True, help="Given by DeepSpeed's launcher.")
    ] = None,
) -> None:
    """Options that stand before the command."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    hold_lifeline()
    if debug:
        os.environ["TREELORA_DEBUG"] = "1"
    set_up_logging(debug=debug)
    if not debug:
        # Libraries warn their callers, that is us; a user of the command can do nothing about it.
        warnings.simplefilter("ignore")


def main() -> NoReturn:
    """Run the command line and exit with the documented code."""
    # Threads that spin long while they wait take the core from the one they wait for: beside a
    # busy neighbour a step then takes many times as long. A short spin costs little where the
    # machine is idle. Read by GNU OpenMP when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except TreeloraError as error:
        _explain(error.message, error.hint, error.exit_code)
        code = error.exit_code
    except BrokenPipeError:
        # The reader has seen enough (`| head`); nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        _explain("interrupted", "", 130)
        code = 130
    except Exception as error:
        hint = "this is a fault in treelora; `treelora --debug ...` shows where"
        _explain(f"{type(error).__name__}: {error}", hint, 1)
        code = 1
    except SystemExit as ending:  # how Typer ends a command, also one that went well
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    else:
        code = 0
    leave(code)


def _explain(message: str, hint: str, code: int) -> None:
    if os.environ.get("TREELORA_DEBUG"):
        stderr().print_exception()
    # The first of several processes speaks for all; another one says who it is.
    who = f"process {rank()}: " if rank() else ""
    if who and code > 128:
        return
    lines = f"{who}error: {message}\n" + (f"{who}hint: {hint}\n" if hint else "")
    sys.stderr.write(lines)
    if "--json" in sys.argv[1:] and not who:
        error = {"message": message, "hint": hint, "code": code}
        document = {"schema_version": SCHEMA_VERSION, "kind": "error", "error": error}
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
