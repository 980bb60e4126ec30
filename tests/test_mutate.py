"""tests/mutate.py on a package of one function."""

from __future__ import annotations

from pathlib import Path

import mutate
import pytest

CODE = "def add(a, b):\n    # the sum\n    return a + b\n"
TEST = "from treelora_cli.toy import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n"
PROPER = {"old": "a + b", "new": "a - b", "what": "sign flipped"}
HARMLESS = {"old": "a + b", "new": "b + a", "what": "sides swapped"}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take most of the time
    root = tmp_path / "toy"
    (root / "tests" / "mutations").mkdir(parents=True)
    (root / "treelora_cli").mkdir()
    (root / "treelora_cli" / "__init__.py").write_text("")
    (root / "treelora_cli" / "toy.py").write_text(CODE)
    (root / "tests" / "test_toy.py").write_text(TEST)
    return root


def suite(root: Path, name: str, *mutations: dict[str, str]) -> None:
    lines = ["tests: [tests/test_toy.py]", "mutations:"]
    for mutation in mutations:
        entry = {"file": "treelora_cli/toy.py", **mutation}
        lines += ["  -", *(f"    {key}: {value!r}" for key, value in entry.items())]
    (root / "tests" / "mutations" / f"{name}.yaml").write_text("\n".join(lines))


def run(root: Path, capsys, *arguments: str) -> tuple[int, list[str]]:
    code = mutate.main(arguments, root)
    return code, capsys.readouterr().out.splitlines()


def test_a_mutation_that_a_test_sees_is_killed(toy, capsys) -> None:
    suite(toy, "toy", PROPER)
    code, lines = run(toy, capsys)
    assert lines == [
        "killed    toy: treelora_cli/toy.py: sign flipped (test_add)",
        "1 killed, 0 SURVIVED, 0 broken",
    ]
    assert code == 0
    assert (toy / "treelora_cli" / "toy.py").read_text() == CODE


def test_a_mutation_that_no_test_sees_survives(toy, capsys) -> None:
    suite(toy, "toy", HARMLESS, PROPER)
    code, lines = run(toy, capsys, "--jobs", "2")
    assert code == 1
    assert [line.split()[0] for line in lines[:-1]] == ["SURVIVED", "killed"]


def test_a_mutation_that_proves_nothing_is_not_killed(toy, capsys) -> None:
    wrong = {
        "0 times": ("a - b", "a + b"),
        "times, not once": ("a", "b"),
        "exit 2": ("a + b", "a +"),
        "NameError": ("a + b", "c"),
        "no such file": ("a + b", "b"),
    }
    changes = [{"old": old, "new": new, "what": why} for why, (old, new) in wrong.items()]
    changes[-1]["file"] = "treelora_cli/absent.py"
    suite(toy, "toy", *changes)
    code, lines = run(toy, capsys)
    assert code == 1
    assert lines[-1] == "0 killed, 0 SURVIVED, 5 broken"
    for why, line in zip(wrong, lines, strict=False):
        assert why in line.partition("(")[2]


def test_tests_must_pass_as_they_are(toy, capsys) -> None:
    (toy / "tests" / "test_toy.py").write_text(TEST.replace("5", "6"))
    suite(toy, "toy", PROPER)
    code, lines = run(toy, capsys)
    assert code == 1
    assert "do not pass as they are" in lines[0]
    assert not any(line.startswith("killed") for line in lines)


def test_suites_are_chosen_by_name(toy, capsys) -> None:
    suite(toy, "one", PROPER)
    suite(toy, "two", HARMLESS)
    assert run(toy, capsys, "one")[0] == 0
    assert run(toy, capsys, "two")[0] == 1
    code, lines = run(toy, capsys, "three")
    assert code == 1
    assert "three" in lines[0]


@pytest.mark.parametrize("text", ["tests: []\nmutations: []", "tests: [a]", "mutations: [{}]"])
def test_a_suite_of_another_form_is_refused(toy, capsys, text) -> None:
    (toy / "tests" / "mutations" / "toy.yaml").write_text(text)
    code, lines = run(toy, capsys)
    assert code == 1
    assert "toy.yaml" in lines[0]


def test_every_suite_of_this_project_fits_its_files() -> None:
    paths = sorted((mutate.ROOT / mutate.FOLDER).glob("*.yaml"))
    assert paths
    for path in paths:
        for mutation in mutate.read(path).mutations:
            content = (mutate.ROOT / mutation.file).read_text(encoding="utf-8")
            assert content.count(mutation.old) == 1, f"{path.name}: {mutation.what}"
            assert mutation.new != mutation.old, f"{path.name}: {mutation.what}"
