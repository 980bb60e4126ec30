"""The formats a report can be written in, and which file suffix asks for which."""

from __future__ import annotations

from pathlib import Path

from treelora_cli.errors import UsageError, did_you_mean

SUFFIXES = {
    ".html": "html",
    ".htm": "html",
    ".md": "md",
    ".markdown": "md",
    ".json": "json",
    ".csv": "csv",
    ".tex": "latex",
    ".txt": "text",
    ".text": "text",
}
FORMATS = ("html", "md", "json", "csv", "latex", "text")


def choose(wanted: str | None, out: Path | None) -> str:
    """Return the format: the one asked for, else the one the suffix of ``out`` stands for.

    Args:
        wanted: the value of ``--format``; None when absent.
        out: the value of ``--out``; None is standard output.

    Raises:
        UsageError: an unknown format, or a suffix that stands for none.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise UsageError(f"unknown format {wanted!r}", did_you_mean(wanted, list(FORMATS)))
        return wanted
    if out is None:
        return "text"
    try:
        return SUFFIXES[out.suffix.lower()]
    except KeyError:
        suffix = repr(out.suffix) if out.suffix else "a name without suffix"
        raise UsageError(
            f"--out {out}: {suffix} does not say which format",
            f"end it in {', '.join(SUFFIXES)}, or add --format {'|'.join(FORMATS)}",
        ) from None
