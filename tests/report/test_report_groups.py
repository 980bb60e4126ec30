from __future__ import annotations

import json
import logging
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixtures import cell, make_cells, make_run, names_for
from test_report_cli import call

from treelora_cli.errors import RunDirError
from treelora_cli.report.collect import collect
from treelora_cli.report.curves import OpCurve, group_curves, op_curves
from treelora_cli.report.document import document
from treelora_cli.report.groups import (
    Spread,
    explained,
    final_rows,
    group_notices,
    grouped,
    plus_minus,
    repeated,
    spread,
)
from treelora_cli.report.html import html
from treelora_cli.report.markdown import markdown
from treelora_cli.report.selection import select
from treelora_cli.report.settings import settings_of
from treelora_cli.report.text import text

KEYS = ("op", "bwt", "bwt_lopez_paz", "forgetting", "fwt")


def brute(values):
    """Mean and sample standard deviation, written out."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def varied(seed: int, drop: float, count: int = 4):
    """Cells that differ from seed to seed."""
    cells = make_cells(names_for(count), count, drop=drop)
    return [
        replace(c, score=c.score + 0.004 * ((seed * (k + 3)) % 17)) for k, c in enumerate(cells)
    ]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two methods under three seeds, as `treelora sweep` leaves them."""
    root = tmp_path_factory.mktemp("groups") / "sweep"
    for method, drop in (("treelora", 0.02), ("seqlora", 0.06)):
        for seed in (1, 2, 10):
            make_run(
                root / f"{method}-seed{seed}",
                tasks=4,
                method=method,
                seed=seed,
                cells=varied(seed, drop),
                tree=method == "treelora",
                steps=3,
            )
    (root / "sweep.json").write_text('{"format": 1, "runs": []}')
    (root / "notes").mkdir()
    make_run(root / ".treelora-seed3.tmp-1-ab", tasks=1, steps=1)
    return root


@pytest.fixture(scope="module")
def reports(sweep):
    return [collect(run) for run in select([sweep]).runs]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_the_spread_is_mean_and_sample_deviation(values):
    found = spread([*values, None])
    mean, std = brute(values)
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.std == pytest.approx(std, abs=1e-12)
    assert found.n == len(values)


def test_one_value_has_no_deviation_and_none_no_mean():
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([None]) is None
    assert plus_minus(Spread(0.5, None, 1)) == "50.00"
    assert plus_minus(Spread(0.1234, 0.0567, 3), sign=True) == "+12.34 ± 5.67"
    assert plus_minus(None) == "—"


def test_runs_that_differ_in_the_seed_alone_are_a_group(reports):
    groups = grouped(reports)
    assert [group.name for group in groups] == ["seqlora", "treelora"]
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2, 10]] * 2
    assert repeated(groups)
    assert group_notices(groups) == []
    for group in groups:
        runs = [report for report in reports if report.method == group.name]
        for key in KEYS:
            mean, std = brute([getattr(run, key) for run in runs])
            assert group.number(key).mean == pytest.approx(mean)
            assert group.number(key).std == pytest.approx(std)
        for n, value in enumerate(group.op_curve()):
            assert (value.mean, value.std) == pytest.approx(brute([r.op_curve[n] for r in runs]))
        for j, (name, final) in enumerate(group.finals().items()):
            assert name == names_for(4)[j]
            finals = [run.tasks[j].final for run in runs]
            assert (final.mean, final.std, final.n) == pytest.approx((*brute(finals), 3))


def test_settings_tell_groups_of_one_method_apart(tmp_path):
    def run(name, seed, **keys):
        lines = "".join(f"  {key}: {value}\n" for key, value in keys.items())
        recipe = f"stream:\n  seed: {seed}\nmethod:\n  name: treelora\n{lines}"
        return collect(make_run(tmp_path / name, tasks=1, steps=1, seed=seed, recipe=recipe))

    runs = [
        run("a", 1, **{"lambda": 0.5}),
        run("b", 2, **{"lambda": 0.5}),
        run("c", 1, **{"lambda": 2, "ramp": "none"}),
    ]
    groups = grouped(runs)
    assert [group.n for group in groups] == [2, 1]
    assert groups[0].name == "treelora (lambda=0.5, ramp=—)"
    assert groups[1].name == "treelora (lambda=2, ramp=none)"


def test_a_setting_is_named_with_its_section_where_its_name_is_not_enough(tmp_path):
    runs = []
    for k, seed in enumerate((1, 2)):
        recipe = f"tree:\n  block: {k}\ndata:\n  block: {k}\n  a: {k}\n  b: {k}\n"
        run = make_run(tmp_path / str(k), tasks=1, steps=1, seed=seed, recipe=recipe)
        runs.append(collect(run))
    names = [group.name for group in grouped(runs)]
    assert names[1] == "treelora (tree.block=1, data.block=1, a=1, 1 more)"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"mode": "own"},
        {"extra": {"data": {"C-STANCE": "x", "FOMC": "y", "MeetingBank": "z"}}},
        {"tasks": 2},
        {"tasks": ["FOMC", "C-STANCE", "MeetingBank"]},
    ],
)
def test_what_a_run_learned_from_parts_groups(tmp_path, change):
    one = make_run(tmp_path / "one", seed=1, steps=1)
    two = make_run(tmp_path / "two", **{"seed": 2, "steps": 1, **change})
    if "model" in change:
        # The weights count, not the name they go by.
        assert len(grouped([collect(one), collect(two)])) == 1
        info = json.loads((two / "run.json").read_text())
        (two / "run.json").write_text(json.dumps({**info, "base_fingerprint": "0" * 64}))
    groups = grouped([collect(one), collect(two)])
    assert len(groups) == 2
    assert len({group.name for group in groups}) == 2


def test_a_run_that_is_not_as_far_and_a_repeated_seed_are_left_out(tmp_path):
    runs = [
        collect(make_run(tmp_path / "a", seed=1)),
        collect(make_run(tmp_path / "b", seed=2, learned=2)),
        collect(make_run(tmp_path / "c", seed=3)),
        collect(make_run(tmp_path / "d", seed=1)),
    ]
    (group,) = grouped(runs)
    assert [run.title for run in group.counted] == ["a", "c"]
    assert group.number("op").n == 2
    said = group_notices([group])
    assert said == [
        f"treelora: not as far as the others, left out: {tmp_path / 'b'}",
        f"treelora: a seed that is there already, left out: {tmp_path / 'd'}",
    ]
    for write in (text, markdown, html):
        assert "a seed that is there already" in " ".join(write(runs).split())
    assert document(runs)["groups"][0]["left_out"] == [str(tmp_path / "b"), str(tmp_path / "d")]


def test_a_number_that_one_run_lacks_says_how_many_it_covers(tmp_path):
    names = names_for(3)
    cells = [c for c in make_cells(names, 3) if (c.after, c.task) != (None, names[1])]
    runs = [
        collect(make_run(tmp_path / "a", seed=1)),
        collect(make_run(tmp_path / "b", seed=2, cells=cells)),
    ]
    (group,) = grouped(runs)
    assert group.number("fwt").n == 1
    assert group.number("op").n == 2
    assert group_notices([group]) == ["treelora: FWT covers 1 of 2 runs"]


def test_every_format_has_the_numbers_over_seeds(reports):
    import html as escaping

    pages = [text(reports, 120), markdown(reports), html(reports)]
    for group in grouped(reports):
        wanted = [plus_minus(group.number(key), sign=key != "op") for key in KEYS]
        wanted += [plus_minus(score) for score in group.finals().values()]
        for page in pages:
            plain = escaping.unescape(page)
            assert [value for value in wanted if value not in plain] == []
            assert "n = 3" in plain
            assert "sample standard deviation (n - 1)" in " ".join(plain.split())


def test_single_runs_are_no_groups_to_show(reports):
    single = [reports[0], reports[-1]]
    for write in (text, markdown, html):
        assert "±" not in write(single)
    assert explained(grouped(single)).endswith("n = 1")


def test_groups_fit_a_narrow_terminal(reports):
    lines = text(reports, 80).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    group = grouped(reports)[0]
    assert plus_minus(group.number("forgetting"), 1, sign=True) in "\n".join(lines)


def test_groups_in_json_stand_beside_the_runs(sweep, reports):
    found = json.loads(call("report", sweep, "--json").stdout)
    assert list(found) == ["schema_version", "runs", "groups"]
    assert [run["seed"] for run in found["runs"]] == [1, 2, 10, 1, 2, 10]
    for stored, group in zip(found["groups"], grouped(reports), strict=True):
        assert stored["name"] == group.name
        assert stored["seeds"] == [1, 2, 10]
        assert (stored["n"], stored["left_out"]) == (3, [])
        for key in KEYS:
            mean, std = brute([getattr(run, key) for run in group.runs])
            assert stored[key] == pytest.approx({"mean": mean, "std": std, "n": 3})
        assert len(stored["op_curve"]) == 4
        assert [task["name"] for task in stored["tasks"]] == names_for(4)


def test_a_folder_of_one_run_has_the_same_json_form(tmp_path):
    make_run(tmp_path / "sweep" / "a", steps=1)
    found = json.loads(call("report", tmp_path / "sweep", "--json").stdout)
    assert len(found["runs"]) == len(found["groups"]) == 1
    assert found["groups"][0]["op"]["std"] is None


def test_bands_and_bars_are_drawn_by_group(reports):
    page = html(reports)
    assert page.count('class="spread s0"') == page.count('class="spread s1"') == 2
    assert page.count('class="bar s0"') == 2 * 4
    drawn = str(op_curves(group_curves(grouped(reports))))
    group = grouped(reports)[0]
    polygon = re.search(r'<polygon points="([^"]+)"', drawn)[1].split()
    assert len(polygon) == 2 * 4
    heights = [float(point.split(",")[1]) for point in polygon]
    upper, lower = heights[:4], heights[::-1][:4]
    stds = [value.std for value in group.op_curve()]
    gaps = [low - high for low, high in zip(lower, upper, strict=True)]
    # The band is twice the deviation high, on one scale for all points; places have one decimal.
    scale = sum(gaps) / sum(stds)
    for gap, std in zip(gaps, stds, strict=True):
        assert gap == pytest.approx(scale * std, abs=0.2)
    line = re.search(r'<polyline points="([^"]+)"', drawn)[1].split()
    for point, high, low in zip(line, upper, lower, strict=True):
        assert float(point.split(",")[1]) == pytest.approx((high + low) / 2, abs=0.11)
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)


def test_a_band_ends_where_scores_end():
    drawn = str(op_curves([OpCurve("a", 2, ((1, 99.0, 5.0), (2, 1.0, 5.0)))]))
    for match in re.finditer('points="([^"]+)"', drawn):
        for point in match[1].split():
            assert 14 <= float(point.split(",")[1]) <= 240 - 36
    assert "OP after 1: 99.00 ± 5.00" in drawn


def test_a_folder_of_runs_is_taken_apart_in_order(sweep):
    chosen = select([sweep])
    assert [run.name for run in chosen.runs] == [
        "seqlora-seed1",
        "seqlora-seed2",
        "seqlora-seed10",
        "treelora-seed1",
        "treelora-seed2",
        "treelora-seed10",
    ]
    assert chosen.from_folder
    run = sweep / "seqlora-seed2"
    assert select([run]).runs == (run,)
    assert not select([run]).from_folder
    assert [r.name for r in select([run, sweep]).runs][:2] == ["seqlora-seed2", "seqlora-seed1"]
    assert len(select([run, sweep]).runs) == 6, "a run that is named twice counts once"


def test_neither_a_run_nor_a_folder_of_runs(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(RunDirError) as caught:
            call("report", path)
        assert str(path) in caught.value.message
        assert caught.value.hint
    with pytest.raises(RunDirError, match="neither a run directory nor a folder of runs"):
        select([tmp_path / "empty"])


def test_a_damaged_run_in_a_folder_is_named(tmp_path):
    make_run(tmp_path / "sweep" / "a", steps=1)
    make_run(tmp_path / "sweep" / "b", steps=1)
    (tmp_path / "sweep" / "b" / "run.json").write_text("{")
    with pytest.raises(RunDirError, match=r"b/run\.json"):
        call("report", tmp_path / "sweep")


def test_runs_of_a_sweep_that_have_not_begun_are_named(tmp_path, caplog):
    sweep = tmp_path / "sweep"
    make_run(sweep / "a-seed1", steps=1)
    (sweep / "sweep.json").write_text('{"format": 1, "runs": ["a-seed1", "a-seed2\\u001b[31m", 3]}')
    with caplog.at_level(logging.WARNING, "treelora"):
        assert len(select([sweep]).runs) == 1
    assert "a-seed2" in caplog.text
    assert "\x1b" not in caplog.text
    for damaged in ("{", "[]", '{"runs": 3}'):
        (sweep / "sweep.json").write_text(damaged)
        assert len(select([sweep]).runs) == 1


def test_settings_are_read_without_the_seed():
    recipe = (
        "stream: {seed: 3, tasks: [a], checkpoint_steps: 5}\nlimit: null\n"
        "model: {name: x, dtype: auto}\noptim:\n  betas: [0.9, 0.95]\n  epochs: {a: 2}\n"
    )
    assert settings_of(recipe) == {
        "limit": "null",
        "model.dtype": "auto",
        "optim.betas": "[0.9, 0.95]",
        "optim.epochs.a": "2",
    }
    assert settings_of("") == {}


@pytest.mark.parametrize(
    "recipe",
    [
        "a: &a [x, x]\nb: [*a, *a]\n",
        "a: [",
        "just text",
        "[" * 5000,
        "a: 2024-99-99",
        "? [a]\n: b\n",
        "a: !!python/object/apply:os.getcwd []",
    ],
)
def test_a_recipe_that_cannot_be_read_groups_with_nothing_else(recipe):
    assert settings_of(recipe) == {"recipe": recipe}


def test_final_rows_cover_the_tasks_of_all_groups(tmp_path):
    runs = [
        collect(make_run(tmp_path / "a", tasks=["x", "y"], steps=1)),
        collect(make_run(tmp_path / "b", tasks=["y", "z"], steps=1)),
    ]
    rows = final_rows(grouped(runs))
    assert [label for label, _ in rows] == ["x", "y", "z"]
    assert [[score is None for score in scores] for _, scores in rows] == [
        [False, True],
        [False, False],
        [True, False],
    ]


def test_synthetic_groups_say_so(tmp_path):
    runs = [
        collect(make_run(tmp_path / f"s{seed}", seed=seed, builtin=True, model="tiny", steps=1))
        for seed in (1, 2)
    ]
    for write in (text, markdown, html):
        assert "built-in, synthetic" in write(runs)
    assert document(runs)["groups"][0]["synthetic"] is True


def test_a_run_learned_at_once_has_a_mean_too(tmp_path):
    names = names_for(3)
    runs = [
        collect(
            make_run(
                tmp_path / f"j{seed}",
                method="joint",
                seed=seed,
                steps=1,
                cells=[cell(names[2], name, 0.5 + seed / 10) for name in names],
            )
        )
        for seed in (1, 2)
    ]
    (group,) = grouped(runs)
    assert group.number("op").mean == pytest.approx(0.65)
    assert group.number("bwt") is None
    assert [value is None for value in group.op_curve()] == [True, True, False]
    html(runs)
