"""What the ``datasets`` library loads, without a network; and clear lines where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from treelora_cli.errors import DataError, EnvironmentProblem, TreeloraError, UsageError
from treelora_cli.tasks.hub import DatasetId, parse_id
from treelora_cli.tasks.layouts import detect, detect_all
from treelora_cli.tasks.load import available, load_found, load_tasks

datasets = pytest.importorskip("datasets")

FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["Bad", "Good"])}
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def films(count: int, start: int = 0, label: int | None = None):
    rows = [
        {"text": f"film {n}", "label": n % 2 if label is None else label}
        for n in range(start, start + count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:glue", DatasetId("glue")),
        ("hf:org/name", DatasetId("org/name")),
        ("hf:org/name@main", DatasetId("org/name", "main")),
        ("hf:org/name:small", DatasetId("org/name", None, "small")),
        (
            "hf:org/name@refs/convert/parquet:a b",
            DatasetId("org/name", "refs/convert/parquet", "a b"),
        ),
    ],
)
def test_hub_ids_are_read(text: str, expected: DatasetId) -> None:
    assert parse_id(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["hf:", "hf:a/b/c", "hf:a b", "hf:org/name@", "hf:@main", "hf::x"])
def test_what_is_no_hub_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no data set") as caught:
        detect(text)
    assert "hf:ORG/NAME[@REVISION][:CONFIG]" in caught.value.hint


def test_names_of_tasks() -> None:
    assert DatasetId("org/name").name == "name"
    assert DatasetId("org/name", None, "small").name == "name-small"
    assert available("hf:org/name@main") == ["name"]


def test_a_folder_through_the_library(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    films(20).to_parquet(tmp_path / "repo/train-00000-of-00001.parquet")
    films(6, 20).to_parquet(tmp_path / "repo/validation-00000-of-00001.parquet")
    films(4, 26, label=-1).to_parquet(tmp_path / "repo/test-00000-of-00001.parquet")
    (loaded,) = load_found(detect(f"hf:{tmp_path}/repo"), ["repo"])
    task = loaded.task
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 18,
        "eval": 2,
        "test": 6,
    }
    assert task.labels == ("Bad", "Good")
    assert task.splits["test"][0].answer == "Bad"
    assert loaded.layout == "dataset"
    assert str(tmp_path) not in task.source
    notes = " ".join(loaded.notes)
    assert "split 'test' has no answers and is not used" in notes
    assert "the evaluation split is the test" in notes
    with pytest.raises(UsageError, match="a folder has no revision"):
        detect(f"hf:{tmp_path}/repo@main")
    with pytest.raises(DataError, match="no such folder"):
        detect(f"hf:{tmp_path}/gone")


def test_saved_to_disk_alone_and_in_a_folder_of_tasks(tmp_path: Path, write) -> None:
    splits = {"train": films(10), "dev": films(3, 10), "test": films(3, 13), "more": films(2, 20)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data/whole")
    films(20).save_to_disk(tmp_path / "data/single")
    write("data/mine.jsonl", [{"prompt": f"p{n}", "answer": "a"} for n in range(9)])
    found = detect(tmp_path / "data")
    assert list(found.tasks) == ["mine", "single", "whole"]
    whole, single = load_found(found, ["whole", "single"])
    assert [len(rows) for rows in whole.task.splits.values()] == [10, 3, 3]
    assert any("split 'more' is not used" in note for note in whole.notes)
    assert sum(map(len, single.task.splits.values())) == 20
    alone = load_tasks(["whole"], tmp_path / "data/whole")
    assert alone == [whole.task]
    assert load_tasks(["whole"], f"hf:{tmp_path}/data/whole") == alone


def test_two_sources_make_one(tmp_path: Path, trace, write) -> None:
    trace("FOMC")
    write("more/mine.jsonl", [{"prompt": f"p{n}", "answer": "a"} for n in range(9)])
    found = detect_all([tmp_path / "data", tmp_path / "more"])
    assert [one.task.name for one in load_found(found, ["mine", "FOMC"])] == ["mine", "FOMC"]
    with pytest.raises(DataError, match="two tasks are called 'FOMC'"):
        detect_all([tmp_path / "data", tmp_path / "data"])


def test_code_of_a_data_set_is_never_run(tmp_path: Path, write) -> None:
    write("code/code.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        load_tasks(["code"], f"hf:{tmp_path}/code")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ran").exists()


def test_offline_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"hf:nobody/nothing@main: cannot be loaded: ") as caught:
        load_tasks(["nothing"], "hf:nobody/nothing@main")
    assert "\n" not in caught.value.message
    assert "HF_HUB_OFFLINE" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            "check",
        ),
        (datasets.exceptions.DatasetNotFoundError("'a/b' is a gated dataset on the Hub"), "log in"),
        (PermissionError("401 Client Error: Unauthorized for url"), "log in"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "network"),
        (ValueError("Config name is missing.\nPlease pick one"), "configuration"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "never run"),
        (KeyError(), "the form is"),
    ],
)
def test_every_failure_has_a_hint(monkeypatch, error: Exception, hint: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        load_tasks(["b"], "hf:a/b")
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("hf:a/b: cannot be loaded: ")


def test_revision_and_configuration_reach_the_library(monkeypatch) -> None:
    asked = {}

    def load(path: str, name: str | None, *, revision: str | None):
        asked.update(path=path, name=name, revision=revision)
        found = datasets.DatasetDict({"train": films(20), "test": films(4, 20)})
        found["train"].info.download_checksums = {f"hf://datasets/a/b@{'0f' * 20}/train.csv": {}}
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    (loaded,) = load_found(detect("hf:a/b@v1:small"), ["b-small"])
    assert asked == {"path": "a/b", "name": "small", "revision": "v1"}
    assert not any("revision" in note for note in loaded.notes)
    (loaded,) = load_found(detect("hf:a/b"), ["b"])
    assert any(f"read at revision {'0f' * 20}" in note for note in loaded.notes)
    assert loaded.task.source == f"dataset layout, hf:a/b at {'0f' * 20}"


def test_a_full_disk_and_a_missing_package(monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        load_tasks(["b"], "hf:a/b")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TreeloraError) as caught:
        load_tasks(["b"], "hf:a/b")
    assert caught.value.exit_code == 6
    assert caught.value.hint == "pip install 'treelora[datasets]'"


def test_splits_without_a_training_split_are_named(monkeypatch) -> None:
    found = datasets.DatasetDict({"a": films(4), "b": films(4)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    with pytest.raises(DataError, match="found the splits a, b, expected train and test"):
        load_tasks(["b"], "hf:a/b")
