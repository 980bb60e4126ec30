from __future__ import annotations

import csv
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixtures import make_run, names_for, score
from test_report_groups import reports, sweep  # noqa: F401 - fixtures

from treelora_cli.report.collect import collect
from treelora_cli.report.csvtable import COLUMNS, csv_table, harmless
from treelora_cli.report.groups import grouped, spread
from treelora_cli.report.latex import _best, _stretches, escaped, latex

HOSTILE = '=HYPERLINK("x")&{}_%$#~^\\'


def rows_of(page: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(page)))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "half"
    return collect(make_run(path, tasks=5, learned=3, builtin=True, model="tiny", steps=1))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "hostile"
    return collect(make_run(path, method=HOSTILE, model='@model, "a"\n-b', steps=1))


def test_csv_read_again_is_the_matrix(half):
    rows = [row for row in rows_of(csv_table([half])) if row["kind"] == "score"]
    read = {(int(row["after_index"]), int(row["task_index"])): row for row in rows}
    for i in range(3):
        for j in range(5):
            value = half.matrix[i][j]
            if value is None:
                assert (i + 1, j + 1) not in read
            else:
                row = read[i + 1, j + 1]
                assert float(row["score"]) == value, "no digit is lost"
                assert (row["after"], row["task"]) == (names_for(5)[i], names_for(5)[j])
                assert (row["rows"], row["metric"]) == ("200", "accuracy")
    for j in range(5):
        assert float(read[0, j + 1]["score"]) == score(-1, j)
        assert read[0, j + 1]["after"] == "zero shot"
    assert len(read) == 5 + 2 + 3 + 4


def test_csv_has_the_numbers_and_who_they_belong_to(half):
    rows = rows_of(csv_table([half]))
    numbers = {row["metric"]: row for row in rows if row["kind"] == "number"}
    for key in ("op", "bwt", "bwt_lopez_paz", "forgetting", "fwt"):
        assert float(numbers[key]["score"]) == getattr(half, key)
        assert (numbers[key]["after_index"], numbers[key]["task"]) == ("3", "")
    curve = [float(row["score"]) for row in rows if row["kind"] == "op_curve"]
    assert curve == list(half.op_curve)
    for row in rows:
        assert row["synthetic"] == "true"
        assert (row["method"], row["adapter"]) == ("treelora", "latest")
        assert row["model"] == "tiny (built-in, synthetic)"
        if not row["kind"].startswith("group"):
            assert (row["run"], row["seed"], row["group"]) == (half.path, "1234", "treelora")


def test_csv_over_seeds(reports):  # noqa: F811
    rows = rows_of(csv_table(reports))
    assert tuple(rows[0]) == COLUMNS
    assert {row["kind"] for row in rows} == {
        "score",
        "number",
        "op_curve",
        "group_number",
        "group_op_curve",
        "group_final",
    }
    for group in grouped(reports):
        mine = [row for row in rows if row["group"] == group.name]
        assert len({row["run"] for row in mine if row["run"]}) == 3
        (op,) = (r for r in mine if r["kind"] == "group_number" and r["metric"] == "op")
        found = spread(
            float(r["score"]) for r in mine if r["kind"] == "number" and r["metric"] == "op"
        )
        assert float(op["score"]) == pytest.approx(found.mean)
        assert float(op["std"]) == pytest.approx(found.std)
        assert op["n"] == "3"
        finals = {r["task"]: float(r["score"]) for r in mine if r["kind"] == "group_final"}
        assert finals == {name: value.mean for name, value in group.finals().items()}
    assert all(row["std"] == "" for row in rows if not row["kind"].startswith("group"))


def test_csv_text_is_never_a_formula(hostile):
    rows = rows_of(csv_table([hostile]))
    for row in rows:
        assert row["method"].startswith("'=HYPERLINK")
        assert row["model"] == '\'@model, "a" -b'
        for column, cell in row.items():
            if cell.startswith(("=", "+", "-", "@")):
                assert column in ("score", "std"), "a number may be negative"
                float(cell)
    assert any(row["score"].startswith("-") for row in rows)


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "＝1", "\t=1"])
def test_a_quote_disarms(text):
    assert harmless(text) == "'" + text
    assert harmless(f"a{text}") == f"a{text}"


def test_csv_of_nothing_learned(tmp_path):
    report = collect(make_run(tmp_path / "run", learned=0, cells=[]))
    assert rows_of(csv_table([report])) == []


def checked(page: str) -> list[list[list[str]]]:
    """Check braces, mathematics, environments and columns; return the cells of each tabular."""
    bare = re.sub(r"\\[\\{}$&#%_]", "", page)
    depth = 0
    for sign in re.sub("%.*", "", bare):
        depth += (sign == "{") - (sign == "}")
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", page):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    assert page.isascii()
    found = []
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}(.*?)\\end", page, re.DOTALL
    ):
        lines = [line.strip() for line in body.splitlines() if line.rstrip().endswith("\\\\")]
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix("\\\\"))]
            for line in lines
        ]
        assert {len(row) for row in rows} == {len(columns)}
        assert [body.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1] * 3
        found.append(rows)
    return found


def test_latex_over_seeds(reports):  # noqa: F811
    page = latex(reports)
    numbers, finals = checked(page)
    assert numbers[0][1:] == [
        r"OP $\uparrow$",
        r"BWT $\downarrow$",
        r"FWT $\uparrow$",
        r"Forgetting $\downarrow$",
    ]
    groups = grouped(reports)
    assert [row[0] for row in numbers[1:]] == [group.name for group in groups]
    for row, group in zip(numbers[1:], groups, strict=True):
        value = group.number("op")
        plain = re.sub(r"\\mathbf\{(.*?)\}", r"\1", row[1])
        assert plain == rf"${100 * value.mean:.2f} \pm {100 * value.std:.2f}$"
    best = max(range(2), key=lambda i: groups[i].number("op").mean)
    least = min(range(2), key=lambda i: groups[i].number("bwt").mean)
    assert ["mathbf" in row[1] for row in numbers[1:]] == [i == best for i in range(2)]
    assert ["mathbf" in row[2] for row in numbers[1:]] == [i == least for i in range(2)]
    assert finals[0] == ["Task", "seqlora", "treelora"]
    assert [row[0] for row in finals[1:]] == names_for(4)
    assert page.count("over runs that differ only in the seed, n = 3") == 2
    assert "synthetic" not in page


def test_latex_of_one_run_has_no_best_and_says_synthetic(half):
    page = latex([half])
    (numbers, finals) = checked(page)
    assert numbers[1][1] == f"${100 * half.op:.2f}$"
    assert "mathbf" not in page
    assert page.count(r"\emph{synthetic}") == 2
    assert "after 3 of 5 tasks" in page
    assert finals[4][1] == "---"
    assert r"\pm" not in page


def test_latex_of_hostile_text(hostile, half):
    page = latex([hostile, half])
    numbers, _ = checked(page)
    assert numbers[1][0] == (
        r"=HYPERLINK(''x'')\&\{\}\_\%\$\#\textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


@given(st.text(max_size=60))
def test_escaped_latex_is_balanced_ascii_without_commands_of_the_text(text):
    shown = escaped("".join(c for c in text if c.isprintable()))
    assert shown.isascii()
    checked(shown)
    assert "--" not in re.sub("---?", "", shown) or "–" in text or "—" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("NumGLUE_cm", r"NumGLUE\_cm"),
        ("50% & #1", r"50\% \& \#1"),
        ("Zürich naïve", r"Z\"{u}rich na\"{\i}ve"),
        ("[x]*", "{[}x]{*}"),
        ("a--b---c", "a-{}-b-{}-{}-c"),
        ("判", "{[}U+5224]"),
        ("λ ± 1", r"$\lambda$ $\pm$ 1"),
        ("a\\b", r"a\textbackslash{}b"),
    ],
)
def test_latex_escapes(text, shown):
    assert escaped(text) == shown


def test_ties_are_all_best_and_a_single_value_is_not():
    values = [spread([0.50001]), spread([0.50004]), None, spread([0.4])]
    assert _best(values, True) == {0, 1}
    assert _best(values, False) == {3}
    assert _best([spread([0.5]), None], True) == set()


def test_many_methods_are_broken_into_tables_that_fit():
    assert _stretches([16] * 5, 60) == [[0, 1, 2], [3, 4]]
    assert _stretches([99, 16], 60) == [[0], [1]]
