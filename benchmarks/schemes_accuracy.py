"""What weight schemes do to tiny-llava's answers, beside fp32 with the same compression, on fresh scenes.

    python benchmarks/schemes_accuracy.py [--scenes 1000] [--plans none fastv] [--schemes int8-w8a8 int4-awq]

Every bundle answers the questions of `accuracy.py`. Calibration uses 32 scenes of other seeds. Per scheme and plan: exact match and its
difference to fp32 with a 95 % interval, answers that changed, answers that changed among those that fp32 was sure of, kept tokens that are
the same, and of the first answer token the KL divergence (mean, nats) and how often the best token is the same.

fp32 is sure of an answer when at every token of it the best logit leads the second by more than the scheme's margin bound in
`verify/tolerances.py`, as a share of the largest magnitude among the logits. A finished row is a file in `--rows`, used again while recipe,
scenes and tmc-export's code for it are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "tiny-llava")]

from benchmarks._answers import ask, divergence, overlap  # noqa: E402
from benchmarks._common import save  # noqa: E402
from benchmarks.accuracy import MODEL, RECIPES, collect, paired  # noqa: E402

PLANS = {"none": None, "visionzip": "tiny-llava-visionzip-fp32", "fastv": "tiny-llava-fastv-fp32", "pool": "tiny-llava-pool-fp32"}
"""Compression → the shipped recipe it is taken from."""

_EIGHT = {"weights": "int8", "activations": "int8"}
_FP8 = {"weights": "fp8", "activations": "fp8"}
_ALL = ("encoder", "projector", "decoder")
SCHEMES: dict[str, dict[str, Any]] = {
    "fp16": dict.fromkeys(_ALL, {"weights": "fp16"}),
    "bf16": dict.fromkeys(_ALL, {"weights": "bf16"}),
    "int8": dict.fromkeys(_ALL, {"weights": "int8"}),
    "int8-w8a8": dict.fromkeys(_ALL, _EIGHT),
    "int8-w8a8-smooth": dict.fromkeys(_ALL, {**_EIGHT, "smooth": 0.5}),
    "fp8": dict.fromkeys(_ALL, {"weights": "fp8"}),
    "fp8-w8a8": dict.fromkeys(_ALL, _FP8),
    "int4-rtn": {"decoder": {"weights": "int4", "block": 32}},
    "int4-awq": {"decoder": {"weights": "int4", "block": 32, "algorithm": "awq"}},
    "int4-gptq": {"decoder": {"weights": "int4", "block": 32, "algorithm": "gptq"}},
    "int8-slots": {"kv": {"weights": "int8"}},
}
"""Name of a row → `quantize`."""
GRADES = {"fp16": "float16", "int8-w8a8": "int8 w8a8", "int8-w8a8-smooth": "int8 w8a8", "fp8-w8a8": "fp8 w8a8", "int8-slots": "int8 slots"}
BOUNDED = {"int8-w8a8-smooth": 0.01, "int4-awq": 0.01}
"""Answers that may change, of those that fp32 is sure of."""
CALIBRATION, FIRST = 32, 700_000


def wants_data(quantize: dict[str, Any]) -> bool:
    """Whether a scheme is found on data."""
    return "kv" in quantize or any("activations" in part or "algorithm" in part for part in quantize.values())


def write_data(folder: Path) -> dict[str, Any]:
    """Write scenes to calibrate on; returns the recipe's `calibration`."""
    from scenes import scene

    (folder / "pictures").mkdir(parents=True)
    lines, seed = [], FIRST
    while len(lines) < CALIBRATION:
        drawn = scene(seed, "train")
        drawn.image.save(folder / "pictures" / f"{seed}.png")
        question = drawn.questions[len(lines) % len(drawn.questions)]
        lines.append(json.dumps({"prompt": question.text, "images": [f"{seed}.png"]}))
        seed += 1
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return {"images": str(folder / "pictures"), "prompts": str(folder / "prompts.jsonl"), "samples": CALIBRATION}


def recipe_of(plan: str, scheme: str, data: dict[str, Any], folder: Path) -> Path:
    """Write the recipe of a row."""
    from tmc_export.recipe import load_recipe

    shipped = PLANS[plan]
    entries = [] if shipped is None else load_recipe(RECIPES / f"{shipped}.yaml").model_dump(mode="json")["compress"]
    quantize = dict(SCHEMES[scheme]) if scheme != "fp32" else {}
    if wants_data(quantize):
        quantize["calibration"] = data
    recipe = {
        "recipe": 1, "name": f"{plan}-{scheme}", "model": {"source": str(MODEL), "dtype": "float32"},
        "inputs": {"images": 1, "text_tokens": 32, "new_tokens": 8},
        "compress": [{k: v for k, v in e.items() if v is not None} for e in entries], "quantize": quantize,
        "target": {"device": "cpu", "runtime": "onnxruntime"},
    }  # fmt: skip
    path = folder / f"{plan}-{scheme}.yaml"
    path.write_text(json.dumps(recipe), "utf-8")
    return path


def answer(path: Path, asked: Sequence[tuple[Any, Any]], folder: Path) -> dict[str, Any]:
    """Build a row's bundle and ask everything; as `ask`, and `marks` ("1" for a right answer), `bytes` of the weights."""
    import tmc_export

    bundle = folder / path.stem
    tmc_export.build(path, bundle, engines=False, record=False)
    found = ask(bundle, [(image, question.text) for image, question in asked])
    found["marks"] = "".join("01"[text == question.answer] for text, (_, question) in zip(found["texts"], asked, strict=True))
    return {**found, "bytes": sum(p.stat().st_size for p in (bundle / "onnx").glob("*.data"))}


def code_digest() -> str:
    """Hash of what a row depends on besides its recipe."""
    digest = hashlib.sha256()
    for room in ("graphs", "tmc_export/quantize", "tmc_export/api", "tmc_export/passes"):
        for path in sorted((REPOSITORY / room).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def row(plan: str, scheme: str, asked: Sequence[tuple[Any, Any]], rows: Path) -> dict[str, Any]:
    """Read a finished row, or make it."""
    recipe = json.dumps([SCHEMES.get(scheme), PLANS[plan], len(asked), CALIBRATION, FIRST])
    key = hashlib.sha256(f"{recipe} {code_digest()}".encode()).hexdigest()
    file = rows / f"{plan}-{scheme}.json"
    if file.is_file() and (found := json.loads(file.read_text("utf-8")))["key"] == key:
        return dict(found)
    with tempfile.TemporaryDirectory(prefix="tmc-schemes-") as place:
        data = write_data(Path(place) / "data")
        found = {"key": key, **answer(recipe_of(plan, scheme, data, Path(place)), asked, Path(place))}
    rows.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n", "utf-8")
    print(f"{plan}, {scheme}: {found['marks'].count('1') / len(asked):.3f}", flush=True)
    return found


def compare(plan: str, scheme: str, mine: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """One row of the table: a scheme beside fp32."""
    from tmc_export.verify.tolerances import margin_bound

    bound = margin_bound(GRADES.get(scheme, scheme.split("-")[0]))
    changed = [a != b for a, b in zip(mine["texts"], base["texts"], strict=True)]
    sure = [lead > bound for lead in base["leads"]]
    turned = sum(c and s for c, s in zip(changed, sure, strict=True))
    same_kept, (kl, same) = overlap(mine, base), divergence(mine, base)
    points, low, high = (100 * x for x in paired([m == "1" for m in mine["marks"]], [m == "1" for m in base["marks"]]))
    share, most = turned / max(sum(sure), 1), BOUNDED.get(scheme)
    right = mine["marks"].count("1") / len(changed)
    return {
        "what": f"{plan}, {scheme}",
        "figure": (
            f"{right:.3f}, {points:+.1f} points ({low:+.1f} to {high:+.1f}); {sum(changed) / len(changed):.1%} changed, {share:.2%} of the "
            f"{sum(sure)} that fp32 is sure of; first token KL {kl:.2g}, same {same:.1%}; "
            + ("" if same_kept is None else f"kept {same_kept:.1%}; ")
            + f"{mine['bytes'] / base['bytes']:.2f} of the bytes"
        ),
        "bound": "" if most is None else f"≤ {most:.0%} of the sure, no loss beyond the interval",
        "ok": None if most is None else bool(share <= most and high >= 0),
        "changed": sum(changed), "sure": sum(sure), "turned": turned, "kl": kl, "same_first": same, "overlap": same_kept,
        "points": [points, low, high], "right": right, "questions": len(changed), "bytes": mine["bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--rows", type=Path, default=REPOSITORY / "out" / "schemes", help="a folder of finished rows")
    options = parser.parse_args()
    asked = collect(options.scenes)
    table = []
    for plan in options.plans:
        base = row(plan, "fp32", asked, options.rows)
        table += [compare(plan, scheme, row(plan, scheme, asked, options.rows), base) for scheme in options.schemes]
    what = f"tiny-llava, {len(asked)} fresh scenes: schemes of encoder, projector and decoder (int4: decoder) beside fp32."
    print(save("schemes_accuracy", {"what": what, "rows": table}))


if __name__ == "__main__":
    main()
