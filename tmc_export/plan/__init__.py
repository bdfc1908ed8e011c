"""The plan: a recipe resolved against a model and a device, so that every count and every shape is a number. No torch."""
