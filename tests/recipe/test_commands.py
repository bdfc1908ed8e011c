"""`schema`, `devices` and `recipes`: what they print, as text and as JSON."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from tmc_export.commands import devices, recipes, schema
from tmc_export.core.errors import RecipeError
from tmc_export.recipe import device_schema, load_recipe, recipe_schema
from tmc_export.recipe import devices as all_devices
from tmc_export.recipe import recipes as all_recipes


def run(command: click.Command, *args: str) -> str:
    result = CliRunner().invoke(command, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_schema() -> None:
    assert json.loads(run(schema.command)) == recipe_schema()
    assert json.loads(run(schema.command, "device")) == device_schema()
    assert CliRunner().invoke(schema.command, ["recipes"]).exit_code == 2


def test_devices() -> None:
    listed = run(devices.command).splitlines()
    names = [device.name for device in all_devices()]
    assert [line.split()[0] for line in listed[1:-1]] == names
    assert [device["name"] for device in json.loads(run(devices.command, "--json"))] == names
    for name in names:
        page = run(devices.command, name)
        assert page.startswith(f"{name}: ") and "memory_bandwidth_gb_s" in page
    assert json.loads(run(devices.command, "rtx-4090", "--json"))["compute_capability"] == "8.9"


def test_unverified_figures_are_marked() -> None:
    page = run(devices.command, "jetson-agx-orin-64gb")
    assert "memory_bandwidth_gb_s: ~204.8" in page and "memory_gib: 64 " in page
    assert "~ and ?: unverified" in page
    assert "memory_gib: ?" in run(devices.command, "cpu")


def test_recipes() -> None:
    assert [line.split()[0] for line in run(recipes.command).splitlines()] == all_recipes()
    assert [recipe["name"] for recipe in json.loads(run(recipes.command, "--json"))] == all_recipes()
    assert run(recipes.command, "quickstart").startswith("# tmc-export build recipes/quickstart.yaml")
    shown = json.loads(run(recipes.command, "quickstart", "--json"))
    assert shown == json.loads(load_recipe("quickstart").canonical_json())


@pytest.mark.parametrize("command", [devices.command, recipes.command])
def test_an_unknown_name_is_a_recipe_error(command: click.Command) -> None:
    with pytest.raises(RecipeError, match=r"is named 'nope'"):
        CliRunner().invoke(command, ["nope"], catch_exceptions=False)
