"""What `treelora methods` tells, from the code itself."""

from __future__ import annotations

import json

from treelora_cli.methods import registry


def test_every_method_is_listed_with_one_line(treelora) -> None:
    outcome = treelora("methods")
    assert outcome.code == 0, outcome
    for name in registry().names():
        assert any(line.startswith(f"{name} ") for line in outcome.out.splitlines())
    listed = json.loads(treelora("methods", "--json").out)["methods"]
    assert [one["name"] for one in listed] == registry().names()
    assert all(one["summary"].endswith(".") and one["about"] for one in listed)
    modes = {one["name"]: one["mode"] for one in listed}
    assert modes["per-task"] == "own"
    assert modes["treelora"] == "latest"
    needs = {one["name"]: one["needs"] for one in listed}
    assert needs["seqlora"] == []
    assert needs["treelora-official"] == ["penalty"]


def test_one_method_shows_settings_and_departures(treelora) -> None:
    outcome = treelora("methods", "treelora-official")
    assert outcome.code == 0, outcome
    for text in ("reg", "0.5", "released code", "far tasks are", "optim.carry=true"):
        assert text in outcome.out
    one = json.loads(treelora("methods", "treelora-official", "--json").out)
    assert all(departure.keys() == {"what", "paper", "released", "here"}
               for departure in one["departures"])  # fmt: skip
    settings = {key["key"]: key for key in json.loads(
        treelora("methods", "treelora", "--json").out)["settings"]}  # fmt: skip
    assert settings["lambda"]["default"] == 3
    assert settings["target"]["values"] == ["path", "leaf"]


def test_an_unknown_method_is_answered_with_the_nearest(treelora) -> None:
    outcome = treelora("methods", "treelora-oficial")
    assert outcome.code == 2
    assert "treelora-official" in outcome.err
