"""The report as LaTeX tables (booktabs) to put into a paper."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from treelora_cli.report.evidence import (
    MEAN_HEADS,
    MEANS_MEANING,
    MEANS_TITLE,
    TASK_KEYS,
    means_cells,
)
from treelora_cli.report.groups import Spread, explained, final_rows, grouped, repeated
from treelora_cli.report.model import RunReport
from treelora_cli.report.words import covers, legends, percent, signed

HIGHER_IS_BETTER = {"op": True, "bwt": False, "fwt": True, "forgetting": False}
"""The columns of the first table and which end of each is the better one."""

_HEADS = {"op": "OP", "bwt": "BWT", "fwt": "FWT", "forgetting": "Forgetting"}
_LINE_WIDTH = 76
"""About how many characters of a table fit between the margins of an article."""

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    # At the head of a row, after a double backslash, these two would be its argument.
    "[": "{[}",
    "*": "{*}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "λ": r"$\lambda$",
    "Δ": r"$\Delta$",
    "·": r"$\cdot$",
    "\u00a0": "~",
}
_ACCENTS = {
    "\u0300": r"\`",
    "\u0301": r"\'",
    "\u0302": r"\^",
    "\u0303": r"\~",
    "\u0304": r"\=",
    "\u0306": r"\u",
    "\u0307": r"\.",
    "\u0308": r"\"",
    "\u030a": r"\r",
    "\u030b": r"\H",
    "\u030c": r"\v",
    "\u0327": r"\c",
    "\u0328": r"\k",
}


@dataclass(frozen=True, slots=True)
class _Line:
    """One method or run of the tables."""

    name: str
    n: int
    mode: str
    numbers: dict[str, Spread | None]
    evidence: list[str]


def latex(reports: Sequence[RunReport]) -> str:
    r"""Return two ``table`` environments to ``\input``: the numbers, and the final scores.

    Args:
        reports: one run or several; runs that differ only in the seed are taken together.
    """
    lines, finals, over_seeds = _contents(reports)
    parts = [
        "% Made by `treelora report`. In the preamble: \\usepackage{booktabs}",
        *_numbers(lines, _caption(reports, over_seeds, "Scores after continual learning")),
        "",
        *_finals(lines, finals, _caption(reports, over_seeds, "Final score on each task")),
        *_evidence(lines, _caption(reports, over_seeds, MEANS_TITLE, scored=False)),
    ]
    return "\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is, in plain article with any engine.

    A character that the standard fonts lack is named by its code point.
    """
    # Two hyphens would become a dash.
    return re.sub("-(?=-)", "-{}", "".join(map(_character, unicodedata.normalize("NFC", text))))


def _character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if " " <= character <= "~":
        return character
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        # An accent takes the place of the dot.
        letter = {"i": r"\i", "j": r"\j"}.get(parts[0], parts[0])
        return f"{_ACCENTS[parts[1]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}]"


def _contents(
    reports: Sequence[RunReport],
) -> tuple[list[_Line], list[tuple[str, list[Spread | None]]], str]:
    """The lines, the final scores, and what stands behind ± (empty without repetitions)."""
    groups = grouped(reports)
    over_seeds = explained(groups) if repeated(groups) else ""
    # Where every group is one run, it has the name that it has in the other formats.
    names = [group.name for group in groups] if over_seeds else legends(reports)
    lines = [
        _Line(
            name,
            group.n,
            group.first.mode,
            {key: group.number(key) for key in _HEADS},
            means_cells(group),
        )
        for name, group in zip(names, groups, strict=True)
    ]
    return lines, final_rows(groups), over_seeds


def _caption(
    reports: Sequence[RunReport], over_seeds: str, title: str, *, scored: bool = True
) -> str:
    models = ", ".join(dict.fromkeys(escaped(report.model) for report in reports))
    modes = ", ".join(dict.fromkeys(escaped(report.mode) for report in reports))
    reach = ", ".join(dict.fromkeys(covers(report) for report in reports))
    facts = [f"{title} with {models}, {reach}"]
    if scored:
        facts.append(rf"full test split, $\times$\,100, adapter mode {modes}")
    if over_seeds:
        facts.append(escaped(over_seeds))
    if any(report.synthetic for report in reports):
        facts.append(r"\emph{synthetic}: the model or tasks are built in or generated")
    return "; ".join(facts) + "."


def _numbers(lines: Sequence[_Line], caption: str) -> Iterator[str]:
    counted = len({line.n for line in lines}) > 1
    moded = len({line.mode for line in lines}) > 1
    arrows = {key: r"$\uparrow$" if high else r"$\downarrow$" for key, high in _best_ends()}
    head = ["Method", *["Adapter"] * moded, *["$n$"] * counted]
    head += [f"{name} {arrows[key]}" for key, name in _HEADS.items()]
    columns = "l" + "l" * moded + "r" * (counted + len(_HEADS))
    caption += " BWT in the sign of TreeLoRA: positive is forgetting."
    bold = {key: _best([line.numbers[key] for line in lines], high) for key, high in _best_ends()}
    rows = []
    for i, line in enumerate(lines):
        cells = [escaped(line.name), *[escaped(line.mode)] * moded, *[str(line.n)] * counted]
        for key in _HEADS:
            write = percent if key == "op" else signed
            cells.append(_cell(line.numbers[key], write, i in bold[key]))
        rows.append(cells)
    yield from _table(caption, "tab:treelora-numbers", [_tabular(columns, head, rows)])


def _best_ends() -> list[tuple[str, bool]]:
    return list(HIGHER_IS_BETTER.items())


def _finals(
    lines: Sequence[_Line], finals: Sequence[tuple[str, list[Spread | None]]], caption: str
) -> Iterator[str]:
    """Tasks down, methods across; as many tabulars below each other as methods need."""
    bold = [_best(scores, True) for _, scores in finals]
    room = _LINE_WIDTH - max((len(task) for task, _ in finals), default=0)
    tabulars = []
    for part in _stretches([max(len(line.name), 15) + 1 for line in lines], room):
        head = ["Task", *(escaped(lines[i].name) for i in part)]
        rows = [
            [escaped(task), *(_cell(scores[i], percent, i in best) for i in part)]
            for (task, scores), best in zip(finals, bold, strict=True)
        ]
        tabulars.append(_tabular("l" + "r" * len(part), head, rows))
    yield from _table(caption, "tab:treelora-finals", tabulars)


def _evidence(lines: Sequence[_Line], caption: str) -> Iterator[str]:
    """The means of the evidence, where a method has any: those over tasks, then over pairs."""
    shown = [line for line in lines if line.evidence]
    if not shown:
        return
    heads = ["ΔW", *MEAN_HEADS.values()]
    tabulars = []
    for part in (slice(0, 1 + len(TASK_KEYS)), slice(1 + len(TASK_KEYS), None)):
        head = ["Method", *map(escaped, heads[part])]
        rows = [[escaped(cell) for cell in (line.name, *line.evidence[part])] for line in shown]
        tabulars.append(_tabular("l" + "r" * (len(head) - 1), head, rows))
    yield ""
    yield from _table(f"{caption} {MEANS_MEANING}", "tab:treelora-evidence", tabulars)


def _stretches(widths: Sequence[int], room: int) -> list[list[int]]:
    """Positions of columns, in runs that fit; one that is too wide stands alone."""
    found: list[list[int]] = []
    used = 0
    for position, width in enumerate(widths):
        if not found or used + width > room:
            found.append([])
            used = 0
        found[-1].append(position)
        used += width
    return found


def _best(values: Sequence[Spread | None], highest: bool) -> set[int]:
    """Positions of the best mean as printed, every one in a tie; none where one stands alone."""
    known = {i: round(100 * value.mean, 2) for i, value in enumerate(values) if value is not None}
    if len(known) < 2:
        return set()
    best = (max if highest else min)(known.values())
    return {i for i, value in known.items() if value == best}


def _cell(value: Spread | None, write: Callable[[float], str], bold: bool) -> str:
    if value is None:
        return "---"
    mean = rf"\mathbf{{{write(value.mean)}}}" if bold else write(value.mean)
    return f"${mean}$" if value.std is None else rf"${mean} \pm {percent(value.std)}$"


def _tabular(columns: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"    {' & '.join(cells)} \\\\"

    return [
        rf"  \begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"    \toprule",
        line(head),
        r"    \midrule",
        *map(line, rows),
        r"    \bottomrule",
        r"  \end{tabular}",
    ]


def _table(caption: str, label: str, tabulars: Sequence[Sequence[str]]) -> Iterator[str]:
    yield r"\begin{table}[t]"
    yield r"  \centering\small\setlength{\tabcolsep}{4pt}"
    yield rf"  \caption{{{caption}}}"
    yield rf"  \label{{{label}}}"
    for position, tabular in enumerate(tabulars):
        if position:
            yield r"  \par\medskip"
        yield from tabular
    yield r"\end{table}"
