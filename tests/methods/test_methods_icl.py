"""ICL: which rows are shown, how a question looks, what fits, and a stream without a step."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from rows_support import start
from safetensors.torch import load_file
from support import toy_arguments, write_task

from treelora_cli.conversation import Conversation, Turn, turns_of
from treelora_cli.methods.base import StreamContext
from treelora_cli.methods.icl import Icl, draw_examples, instruction_of, with_examples
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.recipe import (
    BanditSection,
    DataSection,
    LoraSection,
    ModelSection,
    TreeSection,
)
from treelora_cli.rundir.events import read_events
from treelora_cli.tasks.types import Row, Task

HEAD = "Say what the letter is.\nOne word.\n"


def make_task(pairs: list[tuple[str, str]], name: str = "letters", **more: object) -> Task:
    train = tuple(Row(prompt, answer) for prompt, answer in pairs)
    tests = tuple(Row(f"TEST {n}", "t") for n in range(9))
    splits = {"train": train, "eval": tests, "test": tests}
    return Task(name, "accuracy", "en", 8, splits, "0" * 64, **more)  # type: ignore[arg-type]


def labelled(counts: dict[str, int]) -> Task:
    pairs = [
        (f"{HEAD}Letter {label}{n}\nAnswer:", label)
        for label, c in counts.items()
        for n in range(c)
    ]
    return make_task(pairs, separator=" ")


def started(folder: Path, shots: int = 6, tokens: int = 240) -> Icl:
    model = AdaptedModel(
        load_backbone(ModelSection(name=str(folder), device="cpu")), LoraSection(), 0
    )
    method = Icl(Icl.Settings.model_validate({"shots": shots}))
    data = DataSection(max_prompt_tokens=tokens, max_answer_tokens=8)
    method.start(StreamContext(7, BanditSection(), TreeSection(), data=data), model)
    return method


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"A": 50, "B": 4, "C": 3}, {"A": 2, "B": 2, "C": 2}),
        ({"A": 50, "B": 50}, {"A": 3, "B": 3}),
        ({"A": 50, "B": 1}, {"A": 5, "B": 1}),
        ({"A": 2, "B": 1}, {"A": 2, "B": 1}),
        (dict.fromkeys("ABCDEFGH", 3), None),
    ],
)
def test_answers_take_turns(counts: dict[str, int], expected: dict[str, int] | None) -> None:
    task = labelled(counts)
    for seed in range(20):
        drawn = draw_examples(task, 6, seed)
        assert set(drawn) <= set(task.splits["train"])
        assert len(set(drawn)) == len(drawn)
        found = Counter(row.answer for row in drawn)
        assert found == expected if expected else set(found.values()) == {1}


def test_examples_depend_on_the_seed_and_on_the_task_alone() -> None:
    counts = {"A": 40, "B": 40}
    one = draw_examples(labelled(counts), 6, 1)
    assert one == draw_examples(labelled(counts), 6, 1)
    assert one != draw_examples(labelled(counts), 6, 2)
    pairs = [(row.prompt, row.answer) for row in labelled(counts).splits["train"]]
    assert one != draw_examples(make_task(pairs, "others"), 6, 1)
    firsts = {draw_examples(labelled(counts), 6, seed)[0].answer for seed in range(20)}
    assert firsts == {"A", "B"}


def test_the_layout() -> None:
    task = labelled({"A": 2, "B": 2})
    assert instruction_of(task) == HEAD
    shown = [Row(f"{HEAD}Letter A1\nAnswer:", "A"), Row(f"{HEAD}Letter B0\nAnswer:", "B")]
    assert with_examples(task, HEAD, shown, f"{HEAD}Letter Q\nAnswer:") == (
        "Say what the letter is.\nOne word.\n"
        "Here are examples. Answer the last one in the same way.\n\n"
        "Letter A1\nAnswer: A\n\n"
        "Letter B0\nAnswer: B\n\n"
        "Letter Q\nAnswer:"
    )
    odd = with_examples(task, HEAD, shown[:1], "another question")
    assert odd.endswith("Answer: A\n\nanother question")
    assert with_examples(task, HEAD, [], "as it is") == "as it is"
    assert instruction_of(make_task([("one line 1", "a"), ("one line 2", "b")])) == ""


def test_a_conversation_gets_turns() -> None:
    question = Conversation([Turn("system", "be short"), Turn("user", "2 + 2?")])
    example = Conversation([Turn("system", "be short"), Turn("user", "1 + 1?")])
    task = make_task([("a", "b")])
    found = with_examples(task, "", [Row(example, "2"), Row("3 + 3?", "6")], question)
    assert turns_of(found) == (
        Turn("system", "be short"),
        Turn("user", "1 + 1?"),
        Turn("assistant", "2"),
        Turn("user", "3 + 3?"),
        Turn("assistant", "6"),
        Turn("user", "2 + 2?"),
    )


def test_examples_that_do_not_fit_are_left_out_and_it_is_said(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = labelled({"A": 9, "B": 9})
    prompts = [f"{HEAD}Letter {'x' * n}\nAnswer:" for n in (1, 30, 60, 140)]
    method = started(tiny_model, tokens=150)
    tokenizer = method.model.backbone.tokenizer
    with caplog.at_level(logging.WARNING, logger="treelora"):
        asked = method.questions(task, prompts)
    kept = [text.count("Answer:") - 1 for text in asked]
    assert kept[0] > kept[2] >= kept[3] == 0
    assert kept[0] < 6
    drawn = draw_examples(task, 6, 7)
    for prompt, text, count in zip(prompts, asked, kept, strict=True):
        assert text.endswith(prompt.removeprefix(HEAD))
        assert text == with_examples(task, HEAD, drawn[:count], prompt)
        more = with_examples(task, HEAD, drawn[: count + 1], prompt)
        sizes = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (text, more)]
        assert sizes[1] > 150
        assert sizes[0] <= 150 or count == 0
    mean = sum(kept) / 4
    assert f"task letters: 4 of 4 questions have fewer than 6 examples ({mean:.1f}" in caplog.text
    assert "data.max_prompt_tokens=150" in caplog.text
    caplog.clear()
    assert all(t.count("Answer:") == 7 for t in started(tiny_model).questions(task, prompts[:2]))
    assert not caplog.text


def run(treelora, *asked: str):
    outcome = treelora(*asked)
    assert outcome.code == 0, outcome
    return outcome


def test_a_stream_without_a_step(treelora, tiny_model, toy_data, tmp_path) -> None:
    path = tmp_path / "run"
    sets = ["--set", "optim.carry=true", "--set", "method.shots=2"]
    asked = toy_arguments(tiny_model, toy_data, path, "alpha,beta", "--method", "icl", *sets)
    plan = json.loads(run(treelora, *asked, "--dry-run", "--json").out)
    assert plan["trainable_parameters"] == 0
    assert [(one["epochs"], one["steps"]) for one in plan["tasks"]] == [(0, 0), (0, 0)]
    assert "0 optimizer steps" in run(treelora, *asked, "--dry-run").out
    run(treelora, *asked)
    events = read_events(path / "events.jsonl")
    assert next(e for e in events if e["kind"] == "run_started")["trainable_parameters"] == 0
    begun = [e for e in events if e["kind"] == "task_started"]
    assert [(e["steps"], e["epochs"], e["rows"]) for e in begun] == [(0, 0, 12), (0, 0, 12)]
    assert not [e for e in events if e["kind"] in ("step", "checkpoint")]
    untouched = start(Icl, tiny_model, rank=4).model
    for number, name in enumerate(("alpha", "beta")):
        folder = path / "tasks" / f"{number:03d}-{name}"
        document = json.loads((folder / "task.json").read_text())
        assert document["steps"] == document["epochs"] == document["tokens"] == 0
        assert document["trainable_parameters"] == 0
        stored = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert stored.keys() == untouched.snapshot().keys()
        assert all(not value.any() for key, value in stored.items() if ".lora_B." in key)
    cells = json.loads((path / "scores.json").read_text())["cells"]
    rows = {(cell["after"], cell["task"]): cell for cell in cells}
    assert rows["alpha", "alpha"]["score"] == rows["beta", "alpha"]["score"]
    assert "icl" in run(treelora, "report", str(path)).out
    again = run(treelora, *asked)
    assert "nothing to do" in again.err
    longer = toy_arguments(tiny_model, toy_data, path, "alpha,beta,gamma", "--method", "icl", *sets)
    run(treelora, *longer)
    assert (path / "tasks" / "002-gamma" / "task.json").exists()


def test_what_the_base_is_asked(treelora, tiny_model, tmp_path) -> None:
    """Zero shot the bare question; else the one behind examples, to the base as well: B = 0."""
    from treelora_cli.models.encode import Encoder
    from treelora_cli.models.generate import generate
    from treelora_cli.tasks.load import load_tasks

    data = tmp_path / "data"
    pairs = [(f"{HEAD}Letter {'AB'[n % 2]}{n}\nAnswer:", "AB"[n % 2]) for n in range(20)]
    write_task(data, "letters", {"train": pairs[:10], "eval": pairs[10:12], "test": pairs[12:]})
    path = tmp_path / "run"
    asked = toy_arguments(tiny_model, data, path, "letters", "--method", "icl")
    run(treelora, *asked, "--set", "method.shots=3", "--set", "data.max_prompt_tokens=200")
    task = load_tasks(["letters"], str(data))[0]
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    plain = AdaptedModel(backbone, LoraSection(), 5)
    encoder = Encoder(backbone.tokenizer, 200, 8)
    bare = [row.prompt for row in task.splits["test"]]
    shown = draw_examples(task, 3, 1234)
    behind = [with_examples(task, HEAD, shown, prompt) for prompt in bare]
    longest = min(task.max_answer_tokens, 8) + 1
    for place, prompts in (
        (path / "predictions", bare),
        (path / "tasks" / "000-letters" / "predictions", behind),
    ):
        file = next(place.glob("*.jsonl"))
        said = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
        assert said == generate(plain, encoder, prompts, longest, 64)
    assert len(set(behind)) == 8


def test_nothing_is_trainable(tiny_t5: Path) -> None:
    method = started(tiny_t5)
    assert not method.model.trainable()
    assert not any(method.learns(key) for key in method.model.snapshot())
    task = labelled({"A": 3, "B": 3})
    asked = method.questions(task, [f"{HEAD}Letter Q\nAnswer:"])
    assert asked[0].count("Answer:") == 7
