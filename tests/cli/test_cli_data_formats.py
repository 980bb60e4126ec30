"""A task of the user's own, from file to adapter: no code, guesses shown, chat if wanted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support import make_checkpoint, run_command, toy_arguments

from treelora_cli.cli.logs import NotesOnce, PlainFormatter

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A CSV file of yes-no questions."""
    rows = [f'"Is {n} even, or odd?",{("even", "odd")[n % 2]}' for n in range(24)]
    path = tmp_path / "my_task.csv"
    path.write_text("\n".join(["question,answer", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    folder = make_checkpoint(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_one_file_is_trained_and_its_guesses_are_said(tiny_model, mine, tmp_path) -> None:
    run = tmp_path / "run"
    done = run_command(*toy_arguments(tiny_model, mine, run, "my_task"))
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: my_task: question -> prompt, answer -> answer",
        "note: my_task: one file, split by a hash of the prompts: train 20, eval 2, test 2",
        "note: my_task: not a known task; accuracy guessed (2 distinct answers)",
        "note: my_task: one space put between prompt and answer",
    ]
    task = json.loads((run / "tasks/000-my_task/task.json").read_text())
    assert task["metric"] == "accuracy"
    assert task["labels"] == ["even", "odd"]
    assert str(tmp_path) not in json.dumps(task)


def test_conversations_are_trained_in_the_chat_template(treelora, chat_model, tmp_path) -> None:
    talk = [
        {
            "conversations": [
                {"from": "human", "value": f"First question {n}"},
                {"from": "gpt", "value": "First answer"},
                {"from": "human", "value": f"Is {n} even?"},
                {"from": "gpt", "value": "yes" if n % 2 else "no"},
            ]
        }
        for n in range(24)
    ]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(talk))
    run = tmp_path / "run"
    chat = ("--set", "data.format=chat", "--set", "data.max_prompt_tokens=160")
    arguments = toy_arguments(chat_model, path, run, "talk")
    assert treelora(*arguments, *chat, "--dry-run").code == 0
    outcome = treelora(*arguments, *chat)
    assert outcome.code == 0, outcome
    assert "format: chat" in (run / "recipe.yaml").read_text()
    assert treelora("eval", run, "--split", "eval").code == 0
    outcome = treelora(*arguments, "--set", "data.max_prompt_tokens=160")
    assert outcome.code == 0, "the stored format holds"
    outcome = treelora(*arguments, *chat, "--set", "data.format=plain")
    assert outcome.code == 2
    assert "data.format" in outcome.err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_tokenizer_without_a_chat_template(treelora, tiny_model, mine, tmp_path, more) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, mine, run, "my_task", "--set", "data.format=chat")
    outcome = treelora(*arguments, *more)
    assert outcome.code == 2
    assert "has no chat template" in outcome.err
    assert "hint: use --set data.format=plain" in outcome.err
    assert not run.exists()


def test_raw_data_are_read_strictly(treelora, tiny_model, mine, tmp_path) -> None:
    mine.write_text(mine.read_text() + "a question without an answer,\n")
    outcome = treelora(*toy_arguments(tiny_model, mine, tmp_path / "run", "my_task"))
    assert outcome.code == 3
    assert "my_task.csv:26: answer: found empty text" in outcome.err
    assert "treelora prepare --on-bad-row skip|quarantine" in outcome.err
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_a_task(treelora, tiny_model, mine, tmp_path) -> None:
    def code_of(data: object, name: str) -> tuple[int, str]:
        outcome = treelora(*toy_arguments(tiny_model, data, tmp_path / "run", name))
        return outcome.code, outcome.err

    pytest.importorskip("datasets")
    code, said = code_of("hf:nobody/nothing", "nothing")
    assert (code, said.count("\n")) == (3, 2)
    assert "hf:nobody/nothing" in said
    code, said = code_of(mine.rename(tmp_path / "Lima.csv"), "Lima")
    assert code == 2
    assert "for replay only" in said


def test_notes_are_plain_lines_and_said_once() -> None:
    def line(level: int) -> str:
        return PlainFormatter().format(logging.LogRecord("treelora", level, "", 0, "a", (), None))

    assert [line(level) for level in (20, 30, 40)] == ["note: a", "warning: a", "error: a"]
    once = NotesOnce()
    note = logging.LogRecord("treelora", logging.INFO, "", 0, "a", (), None)
    warning = logging.LogRecord("treelora", logging.WARNING, "", 0, "a", (), None)
    assert [once.filter(record) for record in (note, note, warning, warning)] == [
        True,
        False,
        True,
        True,
    ]
