"""Recipes and devices: YAML in, checked and frozen models out, every error with its place. No torch here."""

from tmc_export.recipe._origin import Origin
from tmc_export.recipe._quantize import Calibration
from tmc_export.recipe._schemes import PARTS, ActivationScheme, WeightScheme
from tmc_export.recipe.device import Device, Figure, device_schema, devices, find_device, load_device
from tmc_export.recipe.load import find_recipe, load_recipe, recipe_schema, recipes
from tmc_export.recipe.recipe import Compress, Inputs, ModelSource, Quantize, QuantizePart, Recipe, Target, WeightsSource

__all__ = [
    "PARTS",
    "ActivationScheme",
    "Calibration",
    "Compress",
    "Device",
    "Figure",
    "Inputs",
    "ModelSource",
    "Origin",
    "Quantize",
    "QuantizePart",
    "Recipe",
    "Target",
    "WeightScheme",
    "WeightsSource",
    "device_schema",
    "devices",
    "find_device",
    "find_recipe",
    "load_device",
    "load_recipe",
    "recipe_schema",
    "recipes",
]
