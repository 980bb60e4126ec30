"""Recipes: every file is found and valid, every mistake names its place and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, toy_rows, write_task

from treelora_cli.engine.plan import resolve_recipe
from treelora_cli.errors import UsageError
from treelora_cli.methods.base import build_method
from treelora_cli.recipe import (
    Recipe,
    build_recipe,
    differences,
    find_recipe,
    parse_overrides,
    read_yaml,
    recipe_names,
)
from treelora_cli.tasks.catalog import KNOWN

FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


def load(path: Path) -> Recipe:
    return build_recipe(read_yaml(path.read_text(encoding="utf-8"), path.name), path.name)


def test_recipes_are_found_not_registered() -> None:
    assert {path.stem for path in FILES} == set(recipe_names())
    assert {"quickstart", "trace", "trace-small"} <= set(recipe_names())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_it_is_for(path: Path) -> None:
    recipe = load(path)
    build_method(recipe)
    assert recipe.stream.tasks
    for task in recipe.stream.tasks:
        assert recipe.epochs_of(task) >= 1
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert find_recipe(path.stem).read_bytes() == path.read_bytes()
    assert build_recipe(read_yaml(recipe.to_yaml(), "again"), "again") == recipe


def training_cases() -> list[object]:
    """Every recipe; those that only vary another one are among the slow tests."""
    marks = {path: [pytest.mark.slow] * path.stem.endswith("-matched") for path in FILES}
    return [pytest.param(path, id=path.stem, marks=marks[path]) for path in FILES]


@pytest.mark.parametrize("path", training_cases())
def test_every_recipe_trains(path: Path, treelora, tmp_path, tmp_path_factory) -> None:
    """A few steps of the real command on a tiny checkpoint, every task of the recipe's stream."""
    from support import make_checkpoint

    recipe = load(path)
    model = make_checkpoint(tmp_path / "model", positions=2048)
    for number, name in enumerate(recipe.stream.tasks):
        rows = {split: toy_rows(number % 4, 4, at) for at, split in
                zip((0, 4, 8), ("train", "eval", "test"), strict=True)}  # fmt: skip
        write_task(tmp_path / "data", name, rows)
    outcome = treelora(
        "train-stream", "--recipe", path, "--model", model, "--data", tmp_path / "data",
        "--run-dir", tmp_path / "run", "--limit", "2", "--set", "eval.when=none",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert len(list((tmp_path / "run").glob("tasks/*/adapter"))) == len(recipe.stream.tasks)


def test_the_papers_setting() -> None:
    recipe = load(ROOT / "recipes" / "trace.yaml")
    epochs = [recipe.epochs_of(task) for task in recipe.stream.tasks]
    assert epochs == [2, 1, 3, 2, 1, 2, 2, 3]
    assert (recipe.optim.lr, recipe.lora.rank, recipe.optim.batch_size) == (1e-4, 8, 32)
    assert recipe.method.settings["lambda"] == 0.5
    assert recipe.bandit.c == 2


ORDERS = {
    "olora-order-1": "dbpedia amazon yahoo agnews",
    "olora-order-2": "dbpedia amazon agnews yahoo",
    "olora-order-3": "yahoo amazon agnews dbpedia",
    "olora-order-4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews "
    "MultiRC yahoo",
    "olora-order-5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp "
    "amazon yahoo",
    "olora-order-6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC "
    "BoolQA WiC",
    "trace-long-15": "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten "
    "dbpedia amazon yahoo agnews yelp BoolQA QQP",
    "math-llm": "ScienceQA NumGLUE-cm NumGLUE-ds",
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_papers_streams_and_their_matched_budgets(name: str) -> None:
    recipe = load(ROOT / "recipes" / f"{name}.yaml")
    matched = load(ROOT / "recipes" / f"{name}-matched.yaml")
    assert recipe.stream.tasks == matched.stream.tasks == tuple(ORDERS[name].split())
    for task in recipe.stream.tasks:
        assert recipe.epochs_of(task) == KNOWN[task].epochs
    assert isinstance(matched.optim.epochs, int)
    differing = {line.partition(":")[0] for line in differences(recipe, matched)}
    assert {key for key in differing if not key.startswith("optim.epochs")} <= {"data.test_rows"}
    assert recipe.data.train_rows == 500


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"optim": {"lrr": 1}}, ["unknown key 'optim.lrr'", "did you mean 'lr'"]),
        ({"opttim": {}}, ["unknown key 'opttim'", "did you mean 'optim'"]),
        ({"optim": {"lr": -1}}, ["optim.lr", "greater than 0", "got -1"]),
        ({"optim": {"lr": "fast"}}, ["optim.lr", "number", "'fast'"]),
        ({"lora": {"rank": 0}}, ["lora.rank", "greater than 0"]),
        ({"optim": {"micro_batch_tokens": 0}}, ["optim.micro_batch_tokens", "greater than 0"]),
        ({"bandit": {"search": "trees"}}, ["bandit.search", "'tree'"]),
        ({"stream": 3}, ["stream", "got 3"]),
    ],
)
def test_mistakes_are_named(document: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        build_recipe(document, "mine.yaml")
    text = f"{raised.value.message} {raised.value.hint}"
    assert raised.value.message.startswith("mine.yaml: ")
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lr: 1\n", "mine.yaml:2:1"),
        ("optim:\n  lr: 1\n  lr: 2\n", "mine.yaml:3:3: not a valid recipe: the key 'lr'"),
        ("- a\n- b\n", "mapping of sections"),
        ("a: !!python/object/apply:os.system ['true']\n", "mine.yaml:1:4"),
        ("a: &a [*a]\n? [1]\n: 2\n", "mine.yaml"),
    ],
)
def test_bad_yaml_is_placed(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=r".") as raised:
        read_yaml(text, "mine.yaml")
    assert words in raised.value.message


def test_overrides() -> None:
    document = parse_overrides(["optim.lr=1e-4", "optim.epochs={a: 2}", "stream.tasks=[a, b]"])
    recipe = build_recipe(document, "set")
    assert recipe.optim.lr == 1e-4
    assert recipe.epochs_of("a") == 2
    assert recipe.stream.tasks == ("a", "b")
    with pytest.raises(UsageError, match="no entry for task 'b'"):
        recipe.epochs_of("b")
    for wrong in ("optim.lr", "=3", "optim.=3"):
        with pytest.raises(UsageError, match=r"section\.key=value"):
            parse_overrides([wrong])


def test_differences_are_by_key_and_leave_places_free() -> None:
    left = build_recipe({"optim": {"lr": 0.1}, "data": {"path": "here"}}, "l")
    right = build_recipe(
        {"optim": {"lr": 0.2}, "data": {"path": "there"}, "stream": {"tasks": ["a"]}}, "r"
    )
    assert differences(left, right) == ["optim.lr: 0.1 -> 0.2"]


def test_flags_win_and_other_methods_settings_are_dropped(tmp_path: Path) -> None:
    flags = {"method": {"name": "seqlora"}, "optim": {"epochs": 3}}
    recipe = resolve_recipe(tmp_path / "run", None, ["optim.epochs=2", "optim.lr=0.5"], flags)
    assert recipe.method.settings == {}
    assert recipe.epochs_of("FOMC") == 3
    assert recipe.optim.lr == 0.5
    assert recipe.stream.tasks[0] == "C-STANCE"  # the quickstart recipe, for the built-in base


def test_every_setting_is_written_out(tmp_path: Path) -> None:
    recipe = resolve_recipe(tmp_path / "run", None, [], {})
    settings = {"lambda", "ramp", "target", "signature", "factors", "start", "start_batches"}
    assert recipe.method.settings.keys() == settings | {"form", "fixed_after"}
