"""On the real tasks: prompts do not name their task, and looks are enough to route them."""

from __future__ import annotations

import re

import pytest
import torch
from routing_trial import SHARED, load, prompts_of, route_all

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder
from treelora_cli.models.features import prompt_features
from treelora_cli.recipe import LoraSection, ModelSection
from treelora_cli.routing.quality import accuracy
from treelora_cli.tasks.shared_text import shared_parts

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data are not here"),
]


def test_no_prompt_names_its_task_or_data_set() -> None:
    tasks = load("all")
    names = [re.escape(task.name) for task in tasks]
    named = re.compile(rf"(?i)\b({'|'.join(names)})\b")
    for task in tasks:
        prompts = [row.prompt for rows in task.splits.values() for row in rows]
        assert not [p for p in prompts if re.search(r"(?m)^(Task|Dataset) ?:", p)], task.name
        assert not named.search(" ".join(shared_parts(prompts))), task.name


@pytest.mark.skipif(not (SHARED / "base").is_dir(), reason="the real base is not here")
def test_prompts_are_routed_by_their_looks() -> None:
    adapted = AdaptedModel(
        load_backbone(ModelSection(name=str(SHARED / "base"), device="cpu")), LoraSection(), seed=0
    )
    encoder = Encoder(adapted.backbone.tokenizer, 767, 200, positions=adapted.backbone.positions)
    prompts = {task.name: prompts_of(task, 24, 6) for task in load("trace")}
    for kind in ("full", "stripped"):
        samples = {}
        for name, kinds in prompts.items():
            train, test = kinds[kind]
            both = prompt_features(adapted, encoder, [*train, *test], 16)
            samples[name] = both[:24], both[24:]
        router, counts = route_all(samples)
        assert float(accuracy(counts).mean()) >= 0.95, kind
        noise = torch.randn(20, both.shape[1], generator=torch.Generator().manual_seed(0))
        assert float(router.route(noise).confidence.max()) < 0.2, "noise looks like no task"
