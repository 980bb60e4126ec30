from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixtures import make_run, names_for, tree_document
from test_report_cli import call

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.report.dendrogram import standalone
from treelora_cli.report.treediff import compare, marks, summary, to_json
from treelora_cli.report.treegraph import dot, mermaid
from treelora_cli.rundir.atomic import write_json

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ['a"b\\N&lt;x>', "`md` **b** #35;", "判断 %%{init}%% ; end", "[x](y) {z} <script>", "- q"]


def tree(shape, names=None, blocks=(), thresholds=()):
    """A tree document from nested pairs of names; cuts are given in pre-order of the groups."""
    leaves: list[str] = []

    def collect(part):
        if isinstance(part, str):
            leaves.append(part)
        else:
            for side in part:
                collect(side)

    collect(shape)
    names = names or sorted(leaves)
    nodes: list[dict] = []
    cuts = iter(range(len(leaves)))

    def grow(part, depth, parent):
        number = len(nodes)
        node = {"id": number, "parent": parent, "children": [], "depth": depth, "radius": 0.1}
        node |= {"split": None, "block": None, "threshold": None, "tasks": []}
        nodes.append(node)
        if isinstance(part, str):
            node["tasks"] = [names.index(part)]
            return number
        cut = next(cuts)
        node["block"] = blocks[cut] if cut < len(blocks) else 0
        node["threshold"] = thresholds[cut] if cut < len(thresholds) else 0.5
        node["split"] = "principal"
        node["children"] = [grow(side, depth + 1, number) for side in part]
        node["tasks"] = sorted({t for child in node["children"] for t in nodes[child]["tasks"]})
        return number

    grow(shape, 0, None)
    return {"format": 1, "tasks": names, "nodes": nodes}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("trees") / "run", tasks=4, builtin=True, model="tiny")


# A quoted Graphviz string, in which a backslash takes the next sign with it.
QUOTED = r'"(?:[^"\\]|\\.)*"'


def read_dot(page):
    """Parse what ``dot`` writes; fails on anything else."""
    lines = page.splitlines()
    assert lines[0] == 'graph "gradient tree" {'
    assert lines[-1] == "}"
    nodes, edges = {}, []
    for line in lines[1:-1]:
        if found := re.fullmatch(rf"  n(\d+) \[shape=(box|ellipse), label=({QUOTED})\];", line):
            text = found[3][1:-1].replace("\\n", "\n") if "N" not in found[3] else found[3][1:-1]
            nodes[int(found[1])] = text.replace('\\"', '"')
        elif found := re.fullmatch(r"  n(\d+) -- n(\d+);", line):
            edges.append((int(found[1]), int(found[2])))
        else:
            assert re.fullmatch(rf"  (graph|node) \[(\w+=(\w+|{QUOTED})(, )?)+\];", line), line
    return nodes, edges


def edges_of(document):
    return [(node["id"], child) for node in document["nodes"] for child in node["children"]]


def test_dot_has_every_node_and_edge(run):
    page = call("tree", "show", run, "--format", "dot").stdout
    nodes, edges = read_dot(page)
    document = tree_document(names_for(4))
    assert edges == edges_of(document)
    assert nodes[0] == "4 tasks\nblock 0 at 0.125"
    assert {"1 C-STANCE", "4 Py150"} <= set(nodes.values())
    assert "treelora on tiny (built-in, synthetic), after Py150 (4 tasks)" in page


def test_dot_quotes_what_it_is_given():
    nodes, _ = read_dot(dot(tree_document(HOSTILE), ['"x"', "y\\"]))
    assert any('a"b\\\\N&amp;lt;x>' in label for label in nodes.values())


@given(
    st.lists(st.text(max_size=12).map(lambda t: "".join(filter(str.isprintable, t))), min_size=1)
)
def test_graph_languages_stay_in_their_lines(names):
    document = tree_document(names)
    _, edges = read_dot(dot(document, names))
    assert edges == edges_of(document)
    assert len(read_mermaid(mermaid(document, names))[0]) == len(document["nodes"])


def read_mermaid(page):
    """Parse what ``mermaid`` writes; fails on anything else."""
    lines = page.split("\n")
    assert (lines[0], lines[2], lines[3], lines[-1]) == ("---", "---", "flowchart LR", "")
    nodes, edges = {}, []
    for line in lines[4:-1]:
        safe = r"(?:[\w .,:|()/=+-]|#\d+;)*"
        label = rf'"({safe}(?:<br>{safe})*)"'
        found = re.fullmatch(rf"  n(\d+)(?:\(\[{label}\]\)|\[{label}\])", line)
        if found:
            text = found[2] or found[3] or ""
            nodes[int(found[1])] = re.sub(r"#(\d+);", lambda f: chr(int(f[1])), text)
        elif found := re.fullmatch(r"  n(\d+) --- n(\d+)", line):
            edges.append((int(found[1]), int(found[2])))
        else:
            assert re.fullmatch(rf"  %% {safe}", line), line
    return nodes, edges, json.loads(lines[1].removeprefix("title: "))


def test_mermaid_has_every_node_and_edge(run):
    nodes, edges, title = read_mermaid(call("tree", "show", run, "--format", "mermaid").stdout)
    assert edges == edges_of(tree_document(names_for(4)))
    assert nodes[0] == "4 tasks<br>block 0 at 0.125"
    assert title == "treelora on tiny (built-in, synthetic), after Py150 (4 tasks)"


def test_mermaid_keeps_hostile_names_in_their_quotes():
    nodes, _, title = read_mermaid(mermaid(tree_document(HOSTILE), ['a "t": # x', "%%{init}%%"]))
    shown = set(nodes.values())
    assert {f"{n} {name}" for n, name in enumerate(HOSTILE, start=1)} <= shown
    assert title == 'a "t": # x'


def test_svg_is_a_file_of_its_own(run):
    page = call("tree", "show", run, "--format", "svg").stdout
    root = ElementTree.fromstring(page)
    assert root.tag == f"{SVG}svg"
    assert page.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<svg ')
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert texts[0] == "treelora on tiny (built-in, synthetic), after Py150 (4 tasks)"
    assert sum("block" in text for text in texts[3:]) == 3, "every split names its block"
    for number, name in enumerate(names_for(4), start=1):
        assert any(text.endswith(f"{number} {name}") for text in texts)
    ground = root.find(f"{SVG}rect")
    assert (ground.get("fill"), ground.get("width")) == ("#ffffff", "100%")
    classes = {part.get("class") for part in root.iter() if part.get("class")}
    rules = root.find(f"{SVG}style").text
    assert all(f".{name}" in rules for name in classes - {"label"})
    assert not {"script", "image", "foreignObject"} & {p.tag.removeprefix(SVG) for p in root.iter()}


def test_svg_of_a_deep_tree_names_every_block():
    root = ElementTree.fromstring(standalone(tree_document(names_for(20)), ["a", "b"]))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert sum(text.startswith("block ") for text in texts) == 19


def test_svg_of_hostile_names_is_xml():
    root = ElementTree.fromstring(standalone(tree_document(HOSTILE), ['<a> & "b"']))
    assert root.find(f"{SVG}title").text == '<a> & "b"'


def test_identical_trees_differ_in_nothing():
    document = tree((("a", "b"), "c"))
    diff = compare(document, document)
    assert (diff.new, diff.moved, diff.gone, diff.made, diff.recut) == ((),) * 5
    assert marks(diff) == {}
    assert summary(diff) == [
        "nothing changed: no task is new, none has moved, every split is the same"
    ]


def test_sides_that_are_swapped_are_the_same_split():
    diff = compare(tree((("a", "b"), "c")), tree(("c", ("b", "a"))))
    assert (diff.moved, diff.gone, diff.made) == ((),) * 3


def test_a_new_task_beside_an_old_one_moves_nobody():
    diff = compare(tree((("a", "b"), "c")), tree(((("a", "n"), "b"), "c")))
    assert diff.new == (("n", ("a",)),)
    assert (diff.moved, diff.gone, diff.made) == ((),) * 3
    assert marks(diff) == {"n": "+ new"}


def test_a_task_that_changes_its_group_has_moved():
    before = tree((("a", "b"), ("c", "d")))
    after = tree((("a", "n"), ("b", ("c", "d"))), names=["a", "b", "c", "d", "n"])
    diff = compare(before, after)
    assert [(m.task, m.was_beside, m.is_beside) for m in diff.moved] == [
        ("a", ("b",), ("n",)),
        ("b", ("a",), ("c", "d")),
    ]
    assert [cut.sides for cut in diff.gone] == [(("a", "b"), ("c", "d")), (("a",), ("b",))]
    assert [cut.sides for cut in diff.made] == [
        (("a",), ("b", "c", "d")),
        (("b",), ("c", "d")),
    ]
    assert diff.recut == ()
    assert marks(diff) == {
        "n": "+ new",
        "a": "~ moved, was beside b",
        "b": "~ moved, was beside a",
    }
    lines = summary(diff)
    assert lines[0].startswith("1 new, 2 moved; splits of the earlier tasks: 2 gone, 2 made")
    assert "~ b: was beside a, now beside c, d" in lines
    assert "+ n: beside a" in lines
    assert "- split gone: a, b | c, d" in lines
    assert "+ split made: b | c, d (block 0 at 0.5)" in lines


def test_a_split_at_another_place_is_named():
    before = tree((("a", "b"), "c"), blocks=(1, 2), thresholds=(0.5, 0.25))
    after = tree((("a", "b"), "c"), blocks=(1, 3), thresholds=(0.75, None))
    diff = compare(before, after)
    assert [(old.block, now.block) for old, now in diff.recut] == [(1, 1), (2, 3)]
    assert [now.sides for _, now in diff.other_block] == [(("a",), ("b",))]
    assert summary(diff)[1:] == [
        "~ split at another block: a | b (block 2 at 0.25, now block 3 by task order)",
        "~ 1 split at the same block with another threshold (see --json)",
    ]


def test_the_first_task_was_alone():
    diff = compare(tree("a"), tree(("a", "b")))
    assert diff.new == (("b", ("a",)),)
    assert (diff.moved, diff.gone, diff.made) == ((),) * 3
    json.dumps(to_json(diff, tree("a"), tree(("a", "b"))))


def shapes(names):
    """Any binary tree over the names."""
    if len(names) == 1:
        return st.just(names[0])
    return st.integers(1, len(names) - 1).flatmap(
        lambda k: st.tuples(shapes(names[:k]), shapes(names[k:]))
    )


def brute_company(shape, name, shared):
    """The other shared names in the smallest part that holds ``name`` and one of them."""
    parts = []

    def walk(part):
        held = {part} if isinstance(part, str) else walk(part[0]) | walk(part[1])
        parts.append(held)
        return held

    walk(shape)
    fitting = [part & shared for part in parts if name in part and len(part & shared) > 1]
    return min(fitting, key=len, default={name}) - {name}


@given(st.data())
def test_moved_is_what_its_definition_says(data):
    shared = data.draw(st.permutations(list("abcde")))
    later = data.draw(st.permutations(list("abcdexy")))
    old, new = data.draw(shapes(shared)), data.draw(shapes(later))
    diff = compare(tree(old), tree(new))
    moved = {
        name
        for name in "abcde"
        if brute_company(old, name, set("abcde")) != brute_company(new, name, set("abcde"))
    }
    assert {m.task for m in diff.moved} == moved
    assert [name for name, _ in diff.new] == ["x", "y"]
    for m in diff.moved:
        assert set(m.is_beside) == brute_company(new, m.task, set("abcdexy"))
    # A binary tree over five tasks has four splits; the restriction keeps that number.
    assert len(diff.gone) == len(diff.made)
    assert bool(diff.moved) <= bool(diff.gone)


def test_the_diff_of_a_run(run):
    shown = call("tree", "show", run, "--diff", "FOMC", "Py150").stdout
    assert "MeetingBank  + new" in shown
    assert "compared with after FOMC" in shown
    assert "2 new, 0 moved" in shown
    same = call("tree", "show", run, "--diff", "FOMC", "FOMC").stdout
    assert "nothing changed" in same
    found = json.loads(call("tree", "show", run, "--diff", "FOMC", "Py150", "--json").stdout)
    assert (found["schema_version"], found["from"], found["to"]) == (1, "FOMC", "Py150")
    assert [entry["task"] for entry in found["new"]] == ["MeetingBank", "Py150"]
    assert found["tree_before"]["tasks"] == names_for(2)
    assert found["tree_after"]["tasks"] == names_for(4)


def test_the_diff_of_a_run_with_a_move(tmp_path):
    path = make_run(tmp_path / "run", tasks=["a", "b", "c"], steps=1)
    write_json(path / "tree" / "history" / "002-c" / "tree.json", tree((("a", "c"), "b")))
    write_json(path / "tree" / "history" / "001-b" / "tree.json", tree(("a", "b")))
    assert "1 new, 0 moved" in call("tree", "show", path, "--diff", "b", "c").stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--diff", "FOMC", "Py150", "--at", "FOMC"], "exclude each other"),
        (["--diff", "FOMC", "Py151"], "no such task"),
        (["--diff", "Py150", "FOMC"], "learned later"),
        (["--diff", "FOMC", "Py150", "--format", "dot"], "cannot be shown as dot"),
        (["--format", "svg", "--json"], "two formats"),
        (["--format", "dott"], "unknown format"),
    ],
)
def test_wrong_use_of_tree_show(run, args, said):
    with pytest.raises(UsageError, match=said) as caught:
        call("tree", "show", run, *args)
    assert caught.value.hint


def test_a_diff_with_a_task_that_is_not_finished(tmp_path):
    half = make_run(tmp_path / "half", tasks=3, learned=2, steps=1)
    with pytest.raises(RunDirError, match="no tree after MeetingBank") as caught:
        call("tree", "show", half, "--diff", "FOMC", "MeetingBank")
    assert "--diff" in caught.value.hint


def test_at_is_drawn_in_every_format(run):
    for chosen in ("dot", "mermaid", "svg"):
        page = call("tree", "show", run, "--at", "FOMC", "--format", chosen).stdout
        assert "after FOMC (2 tasks)" in page
        assert "Py150" not in page
