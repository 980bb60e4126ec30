"""Pre-training: its text holds no built-in row, and the command gives the same bytes twice."""

import hashlib
import json
from itertools import islice

import pytest
from typer.testing import CliRunner

from treelora_cli.cli.builtin import app
from treelora_cli.errors import EnvironmentProblem, UsageError
from treelora_cli.models import pretrain as pretrain_module
from treelora_cli.models.pretrain import PretrainSettings, Reading, pretrain, shipped_base
from treelora_cli.tasks import miniature
from treelora_cli.tasks.miniature import reading as reading_module
from treelora_cli.tasks.miniature.reading import DESCRIPTION, KINDS, Guard, documents

SMALL = PretrainSettings(
    tokens=1500, documents=300, vocabulary=400, hidden=32, layers=2, heads=2, mlp=64, batch=4,
    length=64,
)  # fmt: skip
READING = Reading(documents, DESCRIPTION)
SAMPLE = 8_000


def prompts():
    return [
        row.prompt
        for name in miniature.NAMES
        for rows in miniature.load(name).splits.values()
        for row in rows
    ]


def holders(texts):
    """Return the texts that hold a prompt, by looking up every run of 30 characters."""
    by_start = {}
    for prompt in prompts():
        by_start.setdefault(prompt[:30], []).append(prompt)
    return [
        text
        for text in texts
        if any(
            text.startswith(prompt, at)
            for at in range(len(text) - 29)
            for prompt in by_start.get(text[at : at + 30], ())
        )
    ]


def test_no_document_holds_a_prompt():
    texts = list(islice(documents(PretrainSettings().seed), 30_000))
    texts += islice(documents(PretrainSettings().seed, "tokenizer"), 12_000)
    assert not holders(texts)
    planted = f"some words {prompts()[700]} and more"
    assert holders([*texts[:10], planted]) == [planted]


def test_no_document_holds_the_input_text_of_a_row():
    joined = "\n\n".join(islice(documents(PretrainSettings().seed), SAMPLE))
    for name in miniature.NAMES:
        recipe = next(recipe for recipe in miniature.RECIPES if recipe.name == name)
        before, after = recipe.frame.split("{text}")
        for rows in miniature.load(name).splits.values():
            for row in rows:
                text = row.prompt.removeprefix(before).removesuffix(after)
                judged = text.split("文本：")[-1]
                assert judged not in joined, (name, judged)


def test_the_generator_drops_a_forbidden_document(monkeypatch):
    """The shipped command itself enforces it: a kind that writes a prompt never gets through."""
    forbidden = miniature.load("FOMC").splits["test"][3].prompt
    kinds = ((lambda _rng: forbidden, 1, 1), (lambda _rng: "a harmless line", 1, 1))
    monkeypatch.setattr(reading_module, "KINDS", kinds)
    assert set(islice(documents(7), 50)) == {"a harmless line"}


def test_guard_finds_texts_anywhere_and_nothing_else():
    guard = Guard(["short", "a text of some length", "a text of some other length"])
    assert guard.finds("xx a text of some other length.")
    assert guard.finds("in short")
    assert not guard.finds("a text of some lengt")
    assert not guard.finds("")


def test_documents_are_repeatable_and_parts_are_apart():
    first, again = list(islice(documents(3), 200)), list(islice(documents(3), 200))
    assert first == again
    assert first != list(islice(documents(4), 200))
    assert first != list(islice(documents(3, "tokenizer"), 200))
    assert sum(share for _, share, _ in KINDS) > 0


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_pretraining_twice_gives_the_same_bytes(tmp_path):
    told = []
    result = pretrain(tmp_path / "a", READING, SMALL, lambda *args: told.append(args))
    pretrain(tmp_path / "b", READING, SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert set(digests(tmp_path / "a")) == {file.name for file in shipped_base().iterdir()}
    assert result.tokens_read >= 1500
    assert result.steps == result.tokens_read // 256
    other = pretrain(tmp_path / "c", READING, PretrainSettings(**{**settings(), "seed": 8}))
    assert other.loss != result.loss


def settings():
    from dataclasses import asdict

    return asdict(SMALL)


def test_pretraining_learns(tmp_path):
    told = []
    longer = PretrainSettings(**{**settings(), "tokens": 256 * 100})
    pretrain(tmp_path / "base", READING, longer, lambda *args: told.append(args))
    shares, losses, _ = zip(*told, strict=True)
    assert shares[-1] >= 1.0
    assert losses[-1] < losses[0] - 0.8


def test_wrong_use_is_explained(tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        pretrain(tmp_path / "used", READING, SMALL)
    with pytest.raises(UsageError, match="nothing limits"):
        pretrain(tmp_path / "new", READING, PretrainSettings(tokens=None, minutes=None))
    monkeypatch.setattr(pretrain_module, "__file__", str(tmp_path / "pretrain.py"))
    with pytest.raises(EnvironmentProblem, match="missing"):
        shipped_base()


def test_command_line(tmp_path, monkeypatch):
    run = CliRunner().invoke
    assert run(app, ["path"]).stdout.strip().endswith("builtin")
    assert json.loads(run(app, ["path", "--json"]).stdout)["schema_version"] == 1

    done = run(app, ["export", "--out", str(tmp_path / "data"), "--tasks", "FOMC,20Minuten"])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 6
    rows = json.loads((tmp_path / "data" / "20Minuten" / "test.json").read_text(encoding="utf-8"))
    task = miniature.load("20Minuten")
    assert rows == [{"prompt": r.prompt, "answer": r.answer} for r in task.splits["test"]]
    again = run(app, ["export", "--out", str(tmp_path / "data")])
    assert isinstance(again.exception, UsageError)

    given = []

    def stub(out, reading, settings, progress):
        assert reading.documents is documents
        given.append(settings)
        return pretrain_module.PretrainResult(out, 5, 1, 0.5, 9, 0.1)

    monkeypatch.setattr(pretrain_module, "pretrain", stub)
    done = run(app, ["pretrain", "--out", "x", "--tokens", "5", "--seed", "3", "--json"])
    assert json.loads(done.stdout)["steps"] == 1
    assert (given[0].tokens, given[0].minutes, given[0].seed) == (5, None, 3)
    run(app, ["pretrain", "--out", "x", "--minutes", "2"])
    assert (given[1].tokens, given[1].minutes) == (None, 2.0)
