"""What makes two runs repetitions of each other: all that decides their scores but the seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

# The seed is what repetitions differ in; the order of the tasks and the contents of model and
# data are compared by themselves; where checkpoints fall changes no score.
_LEFT_OUT = frozenset(
    {"stream.seed", "stream.tasks", "stream.checkpoint_steps", "model.name", "data.path"}
)


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, which could make a small file huge in memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def settings_of(recipe: str) -> dict[str, str]:
    """Return the settings of a recipe by their dotted name, without the seed.

    Args:
        recipe: the text of recipe.yaml; one that cannot be read is a single setting.
    """
    if not recipe:
        return {}
    loader = _PlainLoader(recipe)
    try:
        document = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return {"recipe": recipe}
    finally:
        loader.dispose()
    if not isinstance(document, dict):
        return {"recipe": recipe}
    found = _flat(document, "")
    return {key: value for key, value in found.items() if key not in _LEFT_OUT}


def origin_of(info: Mapping[str, Any]) -> str:
    """Return what a run learned from, as text to compare.

    Args:
        info: the document of run.json.
    """
    tasks = [entry["name"] for entry in info["tasks"]]
    data = info.get("data")
    prints = [data.get(name) for name in tasks] if isinstance(data, dict) else None
    base = info.get("base_fingerprint") or info.get("model")
    mode = [info.get("mode"), info.get("decoding")]
    return json.dumps([info.get("method"), base, tasks, prints, mode], default=str)


def _flat(section: Mapping[Any, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{name}.")
        else:
            text = isinstance(value, str)
            found[name] = value if text else json.dumps(value, ensure_ascii=False, default=str)
    return found
