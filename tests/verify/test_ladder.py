"""The ladder on a whole bundle: it passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests._tiny import tmc
from tmc_export.bundle.read import open_manifest
from tmc_export.bundle.write import seal
from tmc_export.core.errors import BundleError, ModelError, ParityError
from tmc_export.runtime._backend import Backend, BackendOptions, Graph
from tmc_export.verify.recorded import FOLDER, Case, read_cases, write_case

torch = pytest.importorskip("torch")

from tmc_export.verify import subgraphs  # noqa: E402
from tmc_export.verify.ladder import RUNGS, climb, recorded_ladder  # noqa: E402
from tmc_export.verify.rungs import Ladder  # noqa: E402
from tmc_export.verify.tolerances import tolerance  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Path:
    return tiny / "model"


@pytest.fixture(scope="module")
def built(tiny: Path) -> Path:
    return tiny / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def statuses(ladder: Ladder) -> dict[str, str]:
    return {r.name: r.status for r in ladder.rungs}


def scale(path: Path, factor: float) -> None:
    """Multiply the float32 weights in the middle of a file."""
    weights = np.fromfile(path, np.float32)
    middle = slice(len(weights) // 3, len(weights) // 2)
    weights[middle] *= np.float32(factor)
    weights.tofile(path)


# ----------------------------------------------------------------------------------------------------------------- good
def test_without_the_checkpoint(built: Path) -> None:
    ladder = recorded_ladder(built)
    assert ladder.passed
    ran = [name for name, status in statuses(ladder).items() if status == "passed"]
    assert ran == ["files", "onnxruntime end to end"] and list(statuses(ladder)) == list(RUNGS)
    assert all(r.note for r in ladder.rungs if r.status == "not run")


def test_with_the_checkpoint(built: Path, checkpoint: Path) -> None:
    said: list[str] = []
    ladder = climb(built, checkpoint, said.append, steps=4)
    assert ladder.passed, ladder.text()
    assert statuses(ladder) == {name: "not run" if name in ("quantized", "TensorRT") else "passed" for name in RUNGS}
    assert said == list(RUNGS[:6])
    files = {c.subgraph for r in ladder.rungs for c in r.checks if c.subgraph}
    assert files == {f"onnx/{p.name}" for p in (built / "onnx").glob("*.onnx")}, "every subgraph was compared"


def test_the_verb_prints_a_rung_a_line(built: Path) -> None:
    ran = tmc("verify", built)
    assert ran.code == 0 and [line.split(":")[0] for line in ran.out.splitlines()] == list(RUNGS)
    data = json.loads(tmc("verify", built, "--json").out)
    assert data["passed"] is True and [r["name"] for r in data["rungs"]] == list(RUNGS)


def test_the_verb_needs_no_torch(built: Path) -> None:
    code = (
        "import sys\nfrom tmc_export.cli import main\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'onnx', 'onnx_ir'): raise ImportError('refused: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "main(['verify', sys.argv[1]], prog_name='tmc-export')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(built)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime end to end: passed" in done.stdout
    with_model = subprocess.run(
        [sys.executable, "-c", code.replace("'verify', ", "'verify', '--model', sys.argv[1], "), str(built)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert with_model.returncode == 2 and "pip install 'tmc-export[export]'" in with_model.stderr


# -------------------------------------------------------------------------------------------------------------- damaged
def test_a_changed_weight_is_found_in_its_block(bundle: Path, checkpoint: Path) -> None:
    scale(bundle / "onnx" / "block_1.data", 1.01)
    seal(bundle, open_manifest(bundle))
    ladder = climb(bundle, checkpoint, steps=4)
    bad = ladder.first_bad
    assert bad is not None and bad.subgraph == "onnx/block_1_prefill.onnx"
    per_subgraph = next(r for r in ladder.rungs if r.name == "onnxruntime per subgraph")
    assert {c.subgraph.split("_")[1] for c in per_subgraph.failures if c.subgraph} == {"1"}, "no other subgraph is blamed"
    with pytest.raises(ParityError, match=r"the first bad subgraph is onnx/block_1_prefill\.onnx"):
        ladder.raise_if_failed()
    assert statuses(ladder)["onnxruntime end to end"] == "failed" and statuses(ladder)["eager with the plan"] == "passed"


def test_a_changed_weight_is_found_without_the_checkpoint(bundle: Path) -> None:
    scale(bundle / "onnx" / "block_1.data", 1.01)
    seal(bundle, open_manifest(bundle))
    ran = tmc("verify", bundle)
    assert ran.code == 4 and "logits" in ran.error()
    assert "onnxruntime end to end: failed" in ran.out


def test_a_flipped_byte_names_the_file(bundle: Path) -> None:
    path = bundle / "onnx" / "block_1.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"onnx/block_1\.data"):
        recorded_ladder(bundle)
    ran = tmc("verify", bundle)
    assert ran.code == 4 and "onnx/block_1.data" in ran.error()


def rerecord(bundle: Path, change: Callable[[np.ndarray], np.ndarray], margin: float, level: bool = False) -> None:
    """Change what the decoder's stage is said to have kept in the conversation `one`; `level`: all candidates are said to score alike."""
    case = next(c for c in read_cases(bundle) if c.name == "one")
    turn = case.turns[0]
    stages = tuple(
        replace(s, kept=change(s.kept), margin=margin, scores=np.ones_like(s.scores) if level else s.scores) for s in turn.expected.stages
    )
    write_case(bundle / FOLDER, replace(case, turns=(replace(turn, expected=replace(turn.expected, stages=stages)),)))
    seal(bundle, open_manifest(bundle))


def another(kept: np.ndarray) -> np.ndarray:
    free = next(i for i in range(len(kept) + 1) if i not in kept)
    return np.sort(np.r_[kept[1:], free])


def test_another_kept_set_is_found_and_named(bundle: Path) -> None:
    rerecord(bundle, another, margin=0.5)
    ladder = recorded_ladder(bundle)
    assert not ladder.passed and ladder.first_bad is not None
    assert ladder.first_bad.subgraph == "onnx/compress_1.onnx" and "fastv at decoder.1" in ladder.first_bad.name


def test_another_kept_set_within_rounding_is_a_tie_that_is_counted(bundle: Path) -> None:
    rerecord(bundle, another, margin=1e-9, level=True)
    ladder = recorded_ladder(bundle)
    end = next(r for r in ladder.rungs if r.name == "onnxruntime end to end")
    assert ladder.passed and len(end.exceptions) == 2, "prefilled whole and in chunks"
    assert "2 ties" in end.line() and "tie: one/turn 1/fastv at decoder.1" in ladder.text()
    assert any("left out" in c.note for c in end.checks) and "2 comparisons left out" in end.line()


def test_a_tie_at_the_threshold_excuses_no_token_far_from_it(bundle: Path) -> None:
    rerecord(bundle, another, margin=1e-9)
    ladder = recorded_ladder(bundle)
    assert not ladder.passed and ladder.first_bad is not None and "fastv at decoder.1" in ladder.first_bad.name


class Forgetful:
    """A backend one of whose graphs loses an output."""

    def __init__(self, backend: Backend, file: str, output: str) -> None:
        self.backend, self.file, self.output = backend, file, output

    def graph(self, file: str) -> Graph:
        graph = self.backend.graph(file)
        if file != self.file:
            return graph
        output = self.output

        class Less:
            def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                return {n: v for n, v in graph.run(feed).items() if n != output}

        return Less()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("file", "output"),
    [("block_1_prefill", "present.1.key"), ("block_1_decode", "logits"), ("block_0_chunk", "hidden_out"), ("compress_1", "kept.0"),
     ("vision_0", "tokens"), ("embed_prefill", "hidden")],
)  # fmt: skip
def test_a_missing_output_fails(built: Path, monkeypatch: pytest.MonkeyPatch, file: str, output: str, answered: list[Case]) -> None:
    path = f"onnx/{file}.onnx"

    def forgetful(name: str, folder: Path, options: BackendOptions) -> Forgetful:
        return Forgetful(open_backend(name, folder, options), path, output)

    open_backend = subgraphs.open_backend
    monkeypatch.setattr(subgraphs, "open_backend", forgetful)
    table = tolerance("subgraph", "float32")
    checks = list(subgraphs.check_subgraphs(built, open_manifest(built).program, answered, table, "float32"))
    failed = [c for c in checks if not c.passed]
    assert failed and {c.subgraph for c in failed} == {path} and any(c.note == "the output is missing" for c in failed)


@pytest.fixture(scope="module")
def answered(built: Path, checkpoint: Path) -> list[Case]:
    """One conversation with everything the reference traces."""
    from tmc_export.plan.make import make_plan
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe.recipe import Recipe
    from tmc_export.verify.record import answer, made_up_scripts
    from tmc_export.verify.reference import Reference

    files = read_model_files(checkpoint)
    plan, _ = make_plan(Recipe.model_validate_json(json.dumps(open_manifest(built).recipe)), files)
    script = next(s for s in made_up_scripts(checkpoint, plan, files) if s.name == "one")
    return [answer(Reference(checkpoint, plan, trace=True), script, plan, 2)]


def test_another_checkpoint_is_refused(built: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors is not the file that the bundle was made from"):
        climb(built, other)
    (other / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 'model\.safetensors'"):
        climb(built, other)


def test_a_plan_that_the_recipe_no_longer_gives_is_refused(bundle: Path, checkpoint: Path) -> None:
    manifest = open_manifest(bundle)
    seal(bundle, manifest.model_copy(update={"plan": {**manifest.plan, "text_tokens": 7}}))
    with pytest.raises(ParityError, match=r"another plan now than when the bundle was built \(text_tokens differ\)"):
        climb(bundle, checkpoint)
