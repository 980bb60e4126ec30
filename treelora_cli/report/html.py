"""The report as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from treelora_cli.report import evidence, words
from treelora_cli.report import groups as seeds
from treelora_cli.report.curves import (
    NARROW,
    STYLES,
    WIDE,
    group_curves,
    key,
    loss_curve,
    op_curves,
    run_curves,
)
from treelora_cli.report.dendrogram import dendrogram
from treelora_cli.report.heatmap import heatmap
from treelora_cli.report.kept import kept
from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import RunReport
from treelora_cli.report.pairmap import pairmap
from treelora_cli.report.ramp import stylesheet


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("treelora_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "signed": words.signed,
        "duration": words.duration,
        "count": words.count,
    }
    environment.globals |= {
        "finals": words.finals,
        "covers": words.covers,
        "heading": words.heading,
        "missing_lines": words.missing_lines,
        "values": words.values,
        "heads": words.HEADS,
        "definitions": DEFINITIONS,
        "limited": words.LIMITED,
        "dash": words.NOT_MEASURED,
        "heatmap": heatmap,
        "kept": kept,
        "evidence": evidence,
        "pairmap": pairmap,
        "loss_curve": loss_curve,
        "dendrogram": dendrogram,
        "op_curves": op_curves,
        "run_curves": run_curves,
        "group_curves": group_curves,
        "group_finals": seeds.final_rows,
        "group_numbers": seeds.printed,
        "plus_minus": seeds.plus_minus,
        "explained": seeds.explained,
        "marked": words.marked,
        "key": lambda position: key(position % STYLES),
        "narrow_width": NARROW,
        "wide_width": WIDE,
        "ramp": Markup(stylesheet()),  # noqa: S704 - made of our own constants
    }
    return environment


def html(reports: Sequence[RunReport]) -> str:
    """Return the page.

    Args:
        reports: one run, or several to compare before each is shown.
    """
    groups = seeds.grouped(reports)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            reports=reports,
            names=words.legends(reports),
            groups=groups if seeds.repeated(groups) else [],
            evidence_means=evidence.means_rows(groups),
            notices=[*words.notices(reports), *seeds.group_notices(groups)],
            title=_title(reports),
        )
    )
    return page.rstrip() + "\n"


def _title(reports: Sequence[RunReport]) -> str:
    if len(reports) == 1:
        return words.heading(reports[0])
    names = ", ".join(dict.fromkeys(report.method for report in reports))
    synthetic = any(report.synthetic for report in reports)
    return words.marked(f"{len(reports)} runs compared: {names}", synthetic)
