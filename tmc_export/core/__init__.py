"""What every room stands on: errors, shapes, facts, registries, lazy imports. Standard library only."""
