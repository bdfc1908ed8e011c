"""What every weight scheme does to every subgraph, to the first token and to time, beside fp32 with the same compression.

    python benchmarks/schemes_error.py [--models tiny-llava smollm2 decoder036b] [--plans none fastv] [--schemes int8 int4-awq] [--rounds 5]
    python benchmarks/schemes_error.py --table

tiny-llava, SmolLM2-135M behind a random tower, and the random 0.36B decoder of `decoder036b.py`. Per model, compression and scheme:

- SQNR of each subgraph, fed with what the model itself gives it: the least over its graphs, outputs and made-up conversations (five of
  tiny-llava's, two of the others');
- of questions about pictures: KL divergence of the first token (nats), how often the best token is the same, kept tokens that are the
  same, answers of 8 tokens that changed; for methods that select the same changes again, simulated (as `tmc-export quantize` does),
  with every choice held as it is in fp32;
- bytes of `onnx/`, and the times of a prefill and of a token, as a share of fp32's: all schemes and fp32 take turns in processes of their
  own, `--rounds` times; 0: the times are not run.

int4 is computed at accuracy level 1 (as a device does) but for the times, which are of level 4. A finished row is a file in `--rows`, or in
the committed results; it is made anew when it is asked for and its recipe or the code of `graphs`, `quantize`, `passes` or `api` has
changed. Rows that are not there are *not run* in the table, and rows of other code there say their commit. With `--rounds 0` and `--keep`
the bundles stay, so that a later run adds the times alone. `--table` writes the table of what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "tiny-llava")]

from benchmarks._answers import ask, divergence, overlap  # noqa: E402
from benchmarks._common import RESULTS, alternate, hardware, paired, save, workplace  # noqa: E402
from benchmarks._decoder036b import measure  # noqa: E402
from benchmarks._error_models import MODELS, PLANS, Model  # noqa: E402
from benchmarks.schemes_accuracy import SCHEMES as SHARED  # noqa: E402
from benchmarks.schemes_accuracy import code_digest, wants_data  # noqa: E402

if TYPE_CHECKING:
    from tmc_export.api.sensitivity import Bench as SensitivityBench
    from tmc_export.quantize.calibrated import Calibrated

SCHEMES: dict[str, dict[str, Any]] = {**SHARED, "fp8-slots": {"kv": {"weights": "fp8"}}}
"""Name of a row → `quantize`."""

TOKENS = 8
"""Of an answer."""


@dataclass
class Bench:
    """The rows of one model."""

    name: str
    base: Path
    rows: Path
    rounds: int
    threads: int | None = None
    cases: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """What is measured."""
        return MODELS[self.name]

    def bundle(self, plan: str, scheme: str, found: Calibrated | None = None) -> Path:
        """Build a row's bundle, unless it is there.

        What calibration `found`, where that is known, is taken.
        """
        from tmc_export.api.bundling import build_bundle

        out = self.base / f"{self.name}-{plan}-{scheme}"
        if not (out / "manifest.json").is_file():
            with ExitStack() as stack:
                if found is not None:
                    stack.enter_context(patch("tmc_export.api.calibrate.calibrate", lambda *_: found))
                build_bundle(self._recipe(plan, scheme), out, record=False, engines=False)
        return out

    def _recipe(self, plan: str, scheme: str) -> Path:
        """Write a row's recipe."""
        quantize: dict[str, Any] = dict(SCHEMES.get(scheme, {}))
        if wants_data(quantize):
            quantize["calibration"] = self._data()
        recipe = {
            "recipe": 1, "name": f"{self.name}-{plan}-{scheme}", "model": {"source": str(self.model.write(self.base)), "dtype": "float32"},
            "inputs": self.model.inputs, "compress": self.model.compress[plan], "quantize": quantize,
            "target": {"device": "cpu", "runtime": "onnxruntime"},
        }  # fmt: skip
        path = self.base / f"{recipe['name']}.json"
        path.write_text(json.dumps(recipe), "utf-8")
        return path

    def _data(self, name: str = "seen") -> dict[str, Any]:
        """Write what is `asked`, or what calibration has `seen`; returns the recipe's `calibration`."""
        from PIL import Image

        folder = self.base / f"{self.name}-{name}"
        folder.mkdir(exist_ok=True)
        asked = self.model.questions()
        lines = []
        half = len(asked) // 2
        for number, (image, question) in enumerate(asked[:half] if name == "asked" else asked[half : half + self.model.seen]):
            Image.fromarray(image).save(folder / f"{number}.png")
            lines.append(json.dumps({"prompt": question, "images": [f"{number}.png"]}))
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        return {"images": str(folder), "prompts": str(folder / "prompts.jsonl"), "samples": len(lines)}

    def row(self, plan: str, scheme: str) -> dict[str, Any] | None:
        """Read a finished row; None when there is none for today's recipe."""
        file = self._file(plan, scheme)
        found = json.loads(file.read_text("utf-8")) if file.is_file() else committed().get(file.stem)
        return found if found is not None and found["recipe"] == self._asked(plan, scheme) else None

    def make(self, plan: str, schemes: Sequence[str]) -> None:
        """Make the rows that are not there, or of other code, but for their times."""
        from tmc_export.recipe import load_recipe

        code = code_digest()
        missing = [scheme for scheme in schemes if (self.row(plan, scheme) or {}).get("code") != code]
        if not missing:
            return
        exact = self._answers(plan, "fp32")
        with self._opened(plan) as first:
            for scheme in missing:
                with first.with_recipe(load_recipe(self._recipe(plan, scheme)), TOKENS) as bench:  # float32's answers are the first's
                    mine = self._measure(plan, scheme, bench, exact)
                row = {"recipe": self._asked(plan, scheme), "code": code, "commit": commit(), **mine, "times": {}}
                self._write(plan, scheme, row)
                print(f"{self.name}, {plan}, {scheme}: {figure(row)}", flush=True)

    @contextmanager
    def _opened(self, plan: str) -> Iterator[SensitivityBench]:
        """Trace a compression's subgraphs, and answer in float32."""
        from tmc_export.api.calibration_data import read_samples
        from tmc_export.api.sensitivity import open_bench

        asked = self._data("asked")
        samples = read_samples(Path(asked["prompts"]), Path(asked["images"]), self.model.held, 1)
        recipe = self._recipe(plan, "fp16")  # whatever quantizes something, and needs no data
        with open_bench(recipe, samples, tokens=TOKENS) as bench:
            yield bench

    def _answers(self, plan: str, scheme: str, found: Calibrated | None = None) -> dict[str, Any]:
        """Build a bundle anew and ask it; the exact one's answers are kept in a file."""
        file, code = self.base / f"{self.name}-{plan}-{scheme}.answers", code_digest()
        given = f"{self._asked(plan, scheme)} {code}"
        if file.is_file() and (kept := json.loads(file.read_text("utf-8")))["given"] == given:
            return dict(kept)
        shutil.rmtree(self.base / f"{self.name}-{plan}-{scheme}", ignore_errors=True)  # of other code
        bundle, asked = self.bundle(plan, scheme, found), self.model.questions()
        answers = ask(bundle, asked[: len(asked) // 2], threads=self.threads, accuracy=1, tokens=TOKENS)
        answers |= {"given": given, "bytes": sum(p.stat().st_size for p in (bundle / "onnx").iterdir())}
        if scheme == "fp32":
            file.write_text(json.dumps(answers), "utf-8")
        return answers

    def _asked(self, plan: str, scheme: str) -> str:
        given = [
            SCHEMES.get(scheme),
            self.model.compress[plan],
            self.model.inputs,
            self.model.seen,
            self.model.held,
            self.model.cases,
            TOKENS,
        ]
        return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]

    def _file(self, plan: str, scheme: str) -> Path:
        return self.rows / f"{self.name}-{plan}-{scheme}.json"

    def _write(self, plan: str, scheme: str, row: dict[str, Any]) -> None:
        self.rows.mkdir(parents=True, exist_ok=True)
        self._file(plan, scheme).write_text(json.dumps(row) + "\n", "utf-8")

    def time(self, plan: str, schemes: Sequence[str]) -> None:
        """Add the times that finished rows lack: ratios to fp32, all schemes taking turns with it."""
        rows = {scheme: found for scheme in schemes if (found := self.row(plan, scheme)) is not None}
        missing = [scheme for scheme, found in rows.items() if not found["times"] and found["code"] == code_digest()]
        if not missing or not self.rounds:
            return
        bundles = {name: self.bundle(plan, name) for name in ("fp32", *missing)}
        turns = {name: partial(measure, path, self.model.prefills, self.model.tokens) for name, path in bundles.items()}
        runs = alternate(turns, self.rounds)
        for scheme in missing:
            ratios = {key: paired(runs[scheme], runs["fp32"], key) for key in ("prefill_ms", "token_ms")}
            times = {"rounds": self.rounds, "load": hardware()["load_average_1min"], **ratios}
            self._write(plan, scheme, {**rows[scheme], "times": times})

    def _measure(self, plan: str, scheme: str, bench: SensitivityBench, exact: dict[str, Any]) -> dict[str, Any]:
        mine = self._answers(plan, scheme, bench.calibrated)
        kl, same = divergence(mine, exact)
        return {
            "kl": kl, "same": same, "kept": overlap(mine, exact), "questions": len(mine["texts"]),
            "changed": sum(a != b for a, b in zip(mine["texts"], exact["texts"], strict=True)),
            "bytes": mine["bytes"] / exact["bytes"],
            "sqnr": self._sqnr(self.base / f"{self.name}-{plan}-{scheme}", plan), "simulated": self._simulated(plan, bench),
        }  # fmt: skip

    def _simulated(self, plan: str, bench: SensitivityBench) -> dict[str, Any] | None:
        """Answers that changed, selections free and held; None where nothing is selected."""
        from tmc_export.api.measuring import effect_of
        from tmc_export.graphs import METHODS

        if not any(METHODS.get(entry["method"]).mechanism != "transform" for entry in self.model.compress[plan]):
            return None
        free, held = bench.measuring.both(bench.everything(), answers=True)
        changed = [None if found is None else effect_of(found).changed for found in (free, held)]
        return {"questions": len(bench.samples), "free": changed[0], "held": changed[1]}

    def _sqnr(self, bundle: Path, plan: str) -> dict[str, float | None]:
        """Subgraph → its least SQNR in dB; None where a selection inside of it is another, so that rows are not comparable."""
        from tmc_export.bundle.read import open_manifest
        from tmc_export.runtime._backend import open_backend, options_for
        from tmc_export.verify.ladder import precision_of_manifest, traced_cases
        from tmc_export.verify.subgraphs import check_subgraphs
        from tmc_export.verify.tolerances import tolerance

        manifest = open_manifest(bundle)
        key = f"{plan} {manifest.program.kv}"
        if key not in self.cases:
            self.cases = {key: traced_cases(manifest, self.model.write(self.base), 2)[1][: self.model.cases]}
        backend = open_backend("onnxruntime", bundle, options_for(manifest.program, self.threads, 1))
        precision = precision_of_manifest(manifest)
        found: dict[str, float | None] = {}
        for check in check_subgraphs(bundle, manifest.program, self.cases[key], tolerance("subgraph", precision), precision, backend):
            name = "_".join((check.subgraph or "").removeprefix("onnx/").removesuffix(".onnx").split("_")[:2])
            if check.metrics is None:
                if not check.passed or check.exceptions:
                    found[name] = None
            elif (before := found.get(name, float("inf"))) is not None:
                found[name] = min(before, check.metrics.sqnr_db)
        return {name: None if dB is None else round(min(dB, 999.0), 2) for name, dB in found.items()}


def commit() -> str:
    """The repository's, abbreviated."""
    done = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@cache
def committed() -> dict[str, dict[str, Any]]:
    """Rows of the committed results."""
    file = RESULTS / "schemes_error.json"
    return dict(json.loads(file.read_text("utf-8"))["raw"]) if file.is_file() else {}


def sharing() -> AbstractContextManager[None]:
    """While active, schemes share the traced graphs of a compression, and their sizes; `tests/api/test_traced.py` shows them equal."""
    from tests._traced import traced_once

    return traced_once(one_checkpoint=True)


def figure(row: dict[str, Any]) -> str:
    """One cell of the table."""
    noise = ", ".join(f"{name} {'selects others' if dB is None else f'{dB:.0f} dB'}" for name, dB in row["sqnr"].items() if dB != 999.0)
    times, simulated = row["times"], row["simulated"]
    held = f" (simulated, of {simulated['questions']}: {simulated['free']}, choices held {simulated['held']})" if simulated else ""
    took = f"prefill {times['prefill_ms']['median']:.2f}, token {times['token_ms']['median']:.2f} of fp32's" if times else "times: not run"
    return (
        f"SQNR {noise or 'infinite'}; KL {max(row['kl'], 0):.2g}, best token the same {row['same']:.0%}; "
        + ("" if row["kept"] is None else f"kept {row['kept']:.1%}; ")
        + f"{row['changed']} of {row['questions']} answers changed{held}; {row['bytes']:.2f} of the bytes; {took}"
        + ("" if row["code"] == code_digest() else f"; on {row['commit']}")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of onnxruntime, but for the times; by default one per core")
    parser.add_argument("--rows", type=Path, default=REPOSITORY / "out" / "schemes", help="a folder of finished rows")
    parser.add_argument("--keep", help="a folder for models and bundles that stays")
    parser.add_argument("--table", action="store_true", help="make no row")
    options = parser.parse_args()
    table, raw = [], {}
    with nullcontext() if options.table else sharing(), workplace(0 if options.table else 16 << 30, options.keep) as base:
        for name in MODELS:
            bench = Bench(name, base, options.rows, options.rounds, options.threads)
            for plan in PLANS:
                if name in options.models and plan in options.plans and not options.table:
                    bench.make(plan, options.schemes)
                    bench.time(plan, options.schemes)
                    if options.rounds or not options.keep:
                        for scheme in ("fp32", *SCHEMES):
                            shutil.rmtree(base / f"{name}-{plan}-{scheme}", ignore_errors=True)
                for scheme in SCHEMES:
                    row = bench.row(plan, scheme)
                    table.append({"what": f"{name}, {plan}, {scheme}", "figure": "*not run*" if row is None else figure(row)})
                    if row is not None:
                        raw[f"{name}-{plan}-{scheme}"] = row
    what = "Weight schemes beside fp32: every subgraph, the first token, time."
    print(save("schemes_error", {"what": what, "commit": commit(), "rows": table, "raw": raw}))


if __name__ == "__main__":
    main()
