"""What a bundle consists of: graphs with their inputs, outputs and sizes, and weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmc_export.bundle.read import open_manifest, path_in
from tmc_export.core.lazy import require

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["describe", "render"]


def describe(folder: str | Path, *, operators: bool = False) -> dict[str, JsonValue]:
    """Return the bundle's parts as JSON data.

    Args:
        folder: the bundle.
        operators: also read every graph and count its operators.

    Raises:
        BundleError: no bundle, or one that cannot be read.
        MissingExtraError: operators are asked for and `onnx_ir` is not installed.
    """
    path = Path(folder)
    manifest = open_manifest(path)
    program = manifest.program
    graphs: dict[str, JsonValue] = {}
    for name in sorted(n for n in manifest.files if n.startswith("onnx/") and n.endswith(".onnx")):
        graphs[name] = {"bytes": manifest.files[name].size, **(_graph(path_in(path, name)) if operators else {})}
    weights: dict[str, JsonValue] = {n: e.size for n, e in sorted(manifest.files.items()) if n.endswith(".data")}
    engines: dict[str, JsonValue] = {p.name: p.stat().st_size for p in sorted((path / "engines").glob("*.engine"))}
    return {
        "name": manifest.name,
        "model": str(manifest.recipe.get("model")),
        "dtype": program.dtype,
        "slots": program.slot_kind,
        "images": program.images,
        "visual_tokens": [v.tokens for v in program.vision],
        "text_towers": [{"file": t.file, "tokens": t.tokens, "width": t.width} for t in program.towers],
        "blocks": [
            {
                "layers": [b.first, b.last],
                "prompt_tokens": b.tokens,
                "capacity": b.capacity,
                "phases": {k: v.file for k, v in b.phases.items()},
            }
            for b in program.blocks
        ],
        "cuts": [
            {
                "before_block": c.before_block,
                "methods": list(c.methods),
                "tokens": [c.tokens_in, c.tokens_out],
                "visual": [c.visual_in, c.visual_out],
            }
            for c in program.cuts
        ],
        "graphs": graphs,
        "weights": weights,
        "engines": engines,
        "proofs": dict(manifest.proofs),
    }


def _graph(path: Path) -> dict[str, JsonValue]:
    ir = require("onnx_ir", extra="export", purpose="read the graphs of a bundle")
    model: Any = ir.load(path)
    counted = Counter(node.op_type for node in model.graph)

    def shapes(values: Any) -> dict[str, JsonValue]:
        return {str(v.name): [int(d) for d in v.shape] for v in values}

    return {"inputs": shapes(model.graph.inputs), "outputs": shapes(model.graph.outputs), "operators": dict(sorted(counted.items()))}


def render(found: dict[str, Any]) -> str:
    """Return `describe`'s result as text."""
    lines = [f"{found['name']}: {found['dtype']}, up to {found['images']} picture(s), visual tokens {found['visual_tokens']}"]
    for tower in found["text_towers"]:
        lines.append(f"  text tower {tower['file']}: a question of {tower['tokens']} tokens -> {tower['width']} channels")
    for block in found["blocks"]:
        lines.append(
            f"  block, layers {block['layers'][0]}..{block['layers'][1] - 1}: "
            f"{block['prompt_tokens']} prompt tokens, {block['capacity']} slots"
        )
    for cut in found["cuts"]:
        lines.append(
            f"  cut before block {cut['before_block']} ({', '.join(cut['methods'])}): "
            f"visual tokens {cut['visual'][0]} -> {cut['visual'][1]}"
        )
    for kind in ("graphs", "weights", "engines"):
        lines.append(f"{kind}:")
        for name, entry in found[kind].items():
            size = entry["bytes"] if isinstance(entry, dict) else entry
            lines.append(f"  {size:>12}  {name}")
            if isinstance(entry, dict) and "operators" in entry:
                for side in ("inputs", "outputs"):
                    lines.append(f"                {side}: " + ", ".join(f"{k} {v}" for k, v in entry[side].items()))
                lines.append("                operators: " + ", ".join(f"{k} {v}" for k, v in entry["operators"].items()))
    lines += [f"{rung}: {outcome}" for rung, outcome in found["proofs"].items()]
    return "\n".join(lines)
