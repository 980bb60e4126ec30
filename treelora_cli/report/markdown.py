"""The report as Markdown with tables, for a README or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from treelora_cli.report.evidence import (
    EVIDENCE_HEADS,
    MEAN_HEADS,
    MEANS_MEANING,
    MEANS_TITLE,
    PAIR_KEYS,
    TASK_KEYS,
    TITLE,
    compared,
    figure_title,
    means_line,
    means_rows,
    sentence,
    shown,
    task_rows,
)
from treelora_cli.report.groups import (
    Group,
    explained,
    final_rows,
    group_notices,
    grouped,
    plus_minus,
    printed,
    repeated,
)
from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import Evidence, RunReport
from treelora_cli.report.words import (
    HEADS,
    LIMITED,
    NOT_MEASURED,
    count,
    covers,
    duration,
    finals,
    heading,
    legends,
    marked,
    missing_lines,
    notices,
    percent,
    signed,
    values,
)

# An underscore inside a word and a point are harmless; everything that could open markup is not.
_MARKUP = re.compile(r"([\\`*\[\]<>|#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def markdown(reports: Sequence[RunReport]) -> str:
    """Return the document.

    Args:
        reports: one run, or several to compare before each is shown.
    """
    blocks: list[str] = []
    if len(reports) == 1:
        blocks.append(f"# {escaped(heading(reports[0]))}")
    else:
        title = f"{len(reports)} runs compared"
        blocks.append(f"# {marked(title, any(report.synthetic for report in reports))}")
    groups = grouped(reports)
    said = [*notices(reports), *group_notices(groups)]
    blocks += [f"> {escaped(notice)}" for notice in said]
    if repeated(groups):
        blocks += [*_seeds(groups), *_evidence_means(groups), _definitions()]
        blocks += ["## Every run", _comparison(reports)]
        return "\n\n".join(block for block in blocks if block) + "\n"
    if len(reports) > 1:
        blocks += [_comparison(reports), _definitions(), *_finals(reports)]
        blocks += _evidence_means(groups)
    for report in reports:
        blocks += _run(report, alone=len(reports) == 1)
    return "\n\n".join(block for block in blocks if block) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\1", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table of cells that are Markdown already.

    Args:
        head: the column heads.
        rows: one sequence of cells per row.
        left: how many leading columns are aligned left; the others are aligned right.
    """
    rule = [":--" if column < left else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _comparison(reports: Sequence[RunReport]) -> str:
    head = ["run", "model", "adapter mode", *HEADS.values(), "trainable", "time"]
    rows = [
        [
            escaped(name),
            escaped(report.model),
            escaped(report.mode),
            *values(report).values(),
            count(report.trainable_parameters),
            duration(report.total_seconds),
        ]
        for report, name in zip(reports, legends(reports), strict=True)
    ]
    return table(head, rows, left=3)


def _finals(reports: Sequence[RunReport]) -> list[str]:
    head = ["task", *(escaped(name) for name in legends(reports))]
    rows = [[escaped(task), *map(percent, scores)] for task, scores in finals(reports)]
    return ["## Final score on each task", table(head, rows)]


def _seeds(groups: Sequence[Group]) -> Iterator[str]:
    yield f"Scores × 100 on the full test split: {explained(groups)}."
    rows = [
        [
            escaped(marked(group.name, group.synthetic)),
            str(group.n),
            *printed(group).values(),
        ]
        for group in groups
    ]
    yield table(["method", "n", *HEADS.values()], rows)
    yield "## Final score on each task"
    head = ["task", *(escaped(group.title) for group in groups)]
    yield table(
        head, [[escaped(task), *map(plus_minus, scores)] for task, scores in final_rows(groups)]
    )


def _definitions() -> str:
    return "\n".join(f"- **{head}**: {escaped(DEFINITIONS[key])}" for key, head in HEADS.items())


def _run(report: RunReport, alone: bool) -> Iterator[str]:
    if not alone:
        yield f"## {escaped(heading(report))}"
    seed = "not recorded" if report.seed is None else str(report.seed)
    yield escaped(
        f"Run {report.path}: {report.status}, seed {seed}, adapter mode {report.mode}, "
        f"decoding {report.decoding or 'not recorded'}. Scores × 100 on the full test split, "
        f"{covers(report)}."
    )
    if alone:
        printed = values(report)
        rows = [[HEADS[key], escaped(DEFINITIONS[key]), printed[key]] for key in HEADS]
        yield table(["number", "meaning", "value"], rows, left=2)
    depth = "##" if alone else "###"
    glance = report.at_a_glance()
    if report.matrix:
        yield f"{depth} Scores"
        yield LIMITED if glance else ""
        yield "Row: after learning this task. Column: score on task. **Bold**: just learned."
        yield _matrix(glance or report)
    yield f"{depth} Tasks"
    yield _tasks(report)
    if report.evidence is not None:
        yield f"{depth} {TITLE}"
        yield from _evidence(report.evidence)
    yield _background(report, depth)


def _matrix(report: RunReport) -> str:
    head = ["after", *(str(number) for number in range(1, len(report.tasks) + 1))]
    rows = [["zero shot", *(percent(task.zero_shot, 1) for task in report.tasks)]]
    for i, row in enumerate(report.matrix):
        if report.joint and all(score is None for score in row):
            continue
        cells = [_cell(score, i, j) for j, score in enumerate(row)]
        rows.append([f"{i + 1} {escaped(report.tasks[i].label)}", *cells])
    return table(head, rows)


def _cell(score: float | None, i: int, j: int) -> str:
    if score is None:
        return NOT_MEASURED if j <= i else ""
    printed = percent(score, 1)
    return f"**{printed}**" if i == j else printed


def _tasks(report: RunReport) -> str:
    head = ["#", "task", "metric", "test rows", "chance", "zero shot", "learned", "final"]
    head += ["change", "steps", "training"]
    rows = [
        [
            str(number),
            escaped(task.label),
            escaped(task.metric or NOT_MEASURED),
            count(task.rows),
            *(percent(value, 1) for value in (task.chance, task.zero_shot, task.own, task.final)),
            signed(task.change, 1),
            count(task.steps),
            duration(task.train_seconds),
        ]
        for number, task in enumerate(report.tasks, start=1)
    ]
    return table(head, rows, left=3)


def _evidence(evidence: Evidence) -> Iterator[str]:
    yield from (escaped(f"Note: {note}.") for note in evidence.notes)
    if not evidence.names:
        return
    yield escaped(compared(evidence))
    rows = [
        [str(number), escaped(name), *map(escaped, cells)]
        for number, name, cells in task_rows(evidence)
    ]
    yield table(["#", "task", *(EVIDENCE_HEADS[key] for key in TASK_KEYS)], rows, left=2)
    for key in PAIR_KEYS if len(evidence.names) > 1 else ():
        yield f"**{figure_title(key)}.** {escaped(sentence(key))}"
        yield _triangle(evidence, key)
    yield escaped(means_line(evidence))


def _triangle(evidence: Evidence, key: str) -> str:
    numbers = [str(place + 1) for place in evidence.places]
    values = getattr(evidence, key)
    rows = [
        [
            f"{numbers[i]} {escaped(evidence.names[i])}",
            *(
                escaped(shown(key, value)) if j < i else ""
                for j, value in enumerate(values[i][:-1])
            ),
        ]
        for i in range(1, len(numbers))
    ]
    return table(["", *numbers[:-1]], rows)


def _evidence_means(groups: Sequence[Group]) -> list[str]:
    rows = [
        [escaped(marked(group.name, group.synthetic)), *map(escaped, cells)]
        for group, cells in means_rows(groups)
    ]
    if not rows:
        return []
    head = ["method", "ΔW", *map(escaped, MEAN_HEADS.values())]
    return [f"## {MEANS_TITLE}", MEANS_MEANING, table(head, rows)]


def _background(report: RunReport, depth: str) -> str:
    parts = [
        f"Training {duration(report.train_seconds)}, evaluation "
        f"{duration(report.evaluate_seconds)}, together {duration(report.total_seconds)}."
    ]
    if report.missing:
        lines = "\n".join(f"- {escaped(line)}" for line in missing_lines(report))
        parts.append(f"{depth} Not measured\n\n{lines}")
    if report.command:
        parts.append(f"{depth} Repeat this run\n\n{fenced(report.command, 'sh')}")
    if report.recipe:
        parts.append(f"{depth} Recipe\n\n{fenced(report.recipe, 'yaml')}")
    return "\n\n".join(parts)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
