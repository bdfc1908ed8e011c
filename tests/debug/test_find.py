"""Faults put into a bundle are found, at the node where they were put; a whole bundle has none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy")

from onnx import helper, numpy_helper  # noqa: E402

from tests._tiny import Ran, listing, tmc  # noqa: E402
from tests.debug._graphs import operators  # noqa: E402
from tmc_export.bundle.program import SlotCodes  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.bundle.write import write_manifest  # noqa: E402
from tmc_export.core.errors import RuntimeInputError  # noqa: E402
from tmc_export.debug import find as finding  # noqa: E402
from tmc_export.debug import localise  # noqa: E402
from tmc_export.debug.find import find  # noqa: E402

PREFILL, DECODE = "onnx/block_1_prefill.onnx", "onnx/block_1_decode.onnx"


def load(path: Path) -> Any:
    return onnx.load(path, load_external_data=False)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    model = load(path)
    change(model)
    path.write_bytes(model.SerializeToString())


def scale_weight(bundle: Path, file: str, part: str, factor: float = 1.01) -> str:
    """Scale the weight whose name holds `part`, in its .data file; returns its name."""
    tensor = next(w for w in load(bundle / file).graph.initializer if part in w.name and w.external_data)
    place = {e.key: e.value for e in tensor.external_data}
    path = (bundle / file).parent / place["location"]
    data = bytearray(path.read_bytes())
    start, length = int(place.get("offset", 0)), int(place["length"])
    values = np.frombuffer(bytes(data[start : start + length]), np.float32) * np.float32(factor)
    data[start : start + length] = values.tobytes()
    path.write_bytes(bytes(data))
    return str(tensor.name)


def debug(bundle: Path, *args: object) -> Ran:
    return tmc("debug", bundle, "-o", bundle.parent / "fault", *args)


def reported(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle.parent / "fault" / "fault.json").read_text()))


def reproduces(bundle: Path) -> int:
    """Run the command that the report gives; its exit status."""
    import shlex

    words = shlex.split(reported(bundle)["reproduce"])
    return subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], capture_output=True, check=False).returncode


# ------------------------------------------------------------------------------------------------------------ nothing fails
def test_nothing_fails_in_a_whole_bundle(good: Path, bundle: Path) -> None:
    before = listing(bundle)
    for args in ((), ("--against", good)):
        ran = debug(bundle, *args)
        assert ran.code == 0 and ran.out.startswith("nothing fails: 11 subgraphs, compared with "), ran.err
    assert json.loads(debug(bundle, "--against", good, "--json").out)["fault"] is None
    assert listing(bundle) == before and not (bundle.parent / "fault").exists()


def test_the_decode_graph_holds_onnxruntimes_attention(good: Path) -> None:
    """What these tests say of such graphs would else be said of none."""
    assert "GroupQueryAttention" in operators(load(good / DECODE))


# ------------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize(("part", "operator"), [("down_proj", "MatMul"), ("q_proj", "MatMul"), ("head", "Gemm")])
def test_a_changed_weight_is_named(good: Path, bundle: Path, part: str, operator: str) -> None:
    name = scale_weight(bundle, PREFILL, part)
    ran = debug(bundle, "--against", good)
    assert ran.code == 4 and f"{operator} '" in ran.error() and "is at fault" in ran.error()
    told = reported(bundle)
    assert told["subgraph"] == PREFILL and told["kind"] == "parity" and told["reduced_nodes"] == 1
    assert told["node"]["operator"] == operator and told["node"]["weights"] == [name] == told["node"]["differing_weights"]
    assert told["changed_files"] == ["onnx/block_1.data"] and told["node"]["error"] > told["node"]["allowed"]
    reduced = onnx.load(bundle.parent / "fault" / "model.onnx")
    assert operators(reduced) == [operator] and [n.name for n in reduced.graph.node] == [told["node"]["name"]]


def test_the_reduced_model_fails_with_polygraphy_alone_and_the_good_weight_passes(good: Path, bundle: Path) -> None:
    name = scale_weight(bundle, PREFILL, "down_proj")
    assert debug(bundle, "--against", good).code == 4
    assert reproduces(bundle) != 0
    path = bundle.parent / "fault" / "model.onnx"
    reduced = onnx.load(path)
    mine = next(w for w in reduced.graph.initializer if w.name == name)
    mine.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mine) / np.float32(1.01), name))
    onnx.save(reduced, path)
    assert reproduces(bundle) == 0


def test_the_checkpoint_names_it_too(model: Path, bundle: Path) -> None:
    name = scale_weight(bundle, PREFILL, "down_proj")
    ran = debug(bundle, "--model", model, "--subgraph", PREFILL)
    assert ran.code == 4, ran.err
    told = reported(bundle)
    assert told["compared_with"] == "a bundle built anew from the checkpoint" and told["node"]["differing_weights"] == [name]


def test_without_anything_to_compare_with_the_answers_still_fail(bundle: Path) -> None:
    """onnxruntime is not at fault, and a changed weight looks like any other: that is said, with the way on."""
    scale_weight(bundle, PREFILL, "down_proj")
    ran = debug(bundle)
    assert ran.code == 4 and "no node can be named" in ran.error() and "--against" in ran.error() and "onnx/block_1.data" in ran.error()
    assert not (bundle.parent / "fault").exists()


def test_a_change_below_the_tolerance_is_none(good: Path, bundle: Path) -> None:
    scale_weight(bundle, PREFILL, "down_proj", 1.001)
    assert debug(bundle, "--against", good, "--tolerance", 0.1).code == 0
    assert debug(bundle, "--against", good).code == 4


def test_json_is_json_and_nothing_else(good: Path, bundle: Path) -> None:
    scale_weight(bundle, PREFILL, "down_proj")
    ran = debug(bundle, "--against", good, "--subgraph", PREFILL, "--json")
    told = json.loads(ran.out)["fault"]
    assert ran.code == 4 and told["folder"] == str(bundle.parent / "fault")
    assert {k: v for k, v in told.items() if k != "folder"} == reported(bundle)


# -------------------------------------------------------------------------------------------------------------------- graphs
def wrong_epsilon(model: Any) -> None:
    """A pass that folds a wrong constant: the sum under the first root."""
    root = next(n for n in model.graph.node if n.op_type == "Sqrt")
    added = next(n for n in model.graph.node if root.input[0] in n.output)
    model.graph.initializer.append(numpy_helper.from_array(np.float32([0.5]), "wrong"))
    added.input[1] = "wrong"


def test_a_wrong_constant_in_one_phase_is_found_in_that_phase(good: Path, bundle: Path) -> None:
    edit(bundle / DECODE, wrong_epsilon)
    ran = debug(bundle, "--against", good)
    assert ran.code == 4, ran.err
    told = reported(bundle)
    assert told["subgraph"] == DECODE and told["node"]["operator"] == "Add" and told["reduced_nodes"] == 1
    assert debug(bundle, "--against", good, "--subgraph", PREFILL).code == 0, "the other phases are right"


def test_attention_of_another_domain_can_be_at_fault(good: Path, bundle: Path) -> None:
    def another_scale(model: Any) -> None:
        node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
        del node.attribute[:]
        node.attribute.extend([helper.make_attribute("num_heads", 4), helper.make_attribute("kv_num_heads", 2)])
        node.attribute.append(helper.make_attribute("do_rotary", 1))
        node.attribute.append(helper.make_attribute("scale", 3.0))

    edit(bundle / DECODE, another_scale)
    assert debug(bundle, "--against", good).code == 4
    told = reported(bundle)
    assert told["node"]["operator"] == "com.microsoft::GroupQueryAttention" and told["reduced_nodes"] == 1


def test_a_quantized_graph_against_its_float_twin(good: Path, int4: Path, tmp_path: Path) -> None:
    ran = tmc("debug", int4, "--against", good, "--tolerance", 0.01, "-o", tmp_path / "fault")
    assert ran.code == 4, ran.err
    told = json.loads((tmp_path / "fault" / "fault.json").read_text())
    reduced = operators(onnx.load(tmp_path / "fault" / "model.onnx"))
    assert "DequantizeLinear" in reduced and "MatMul" in reduced and len(reduced) <= 4
    assert any("DequantizeLinear" in beside for beside in told["node"]["beside"])
    assert tmc("debug", int4, "--against", good, "--tolerance", 0.9, "-o", tmp_path / "none").code == 0


def test_a_bug_in_a_pass(good: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation's signs are lost. What is built anew has the bug too, which is said; a bundle of the good version shows the node."""
    from tests._tiny import write_recipe
    from tmc_export.passes import sign_rotation

    real = sign_rotation.constant

    def unsigned(graph: Any, name: str, values: Any, dtype: Any) -> Any:
        return real(graph, name, np.abs(values), dtype)

    monkeypatch.setattr(sign_rotation, "constant", unsigned)
    (tmp_path / "model").symlink_to(model)
    bad = tmp_path / "bad"
    assert tmc("build", write_recipe(tmp_path), "-o", bad, "-q", "--no-record").code == 0
    ran = debug(bad, "--model", model)
    assert ran.code == 4 and "the export or a pass is at fault" in ran.error() and "onnx/block_0_prefill.onnx" in ran.error()
    assert not (tmp_path / "fault").exists()
    ran = debug(bad, "--against", good)
    assert ran.code == 4, ran.err
    told = reported(bad)
    assert told["subgraph"] == "onnx/block_0_prefill.onnx" and told["node"]["operator"] == "Mul" and told["reduced_nodes"] == 1
    assert told["node"]["output"].endswith(".signed") and told["changed_files"] == []


def test_answers_that_cannot_be_played_are_a_failure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wrong graph gives may make the next step impossible: no mistake of the user's."""

    def impossible(*_: object) -> None:
        raise RuntimeInputError("nothing is left of the prompt")

    monkeypatch.setattr(finding, "play", impossible)
    ran = debug(bundle)
    assert ran.code == 4 and "cannot be played (nothing is left of the prompt)" in ran.error() and "no node can be named" in ran.error()


@pytest.mark.parametrize("damage", ["cut short", "no graph"])
def test_damaged_files_end_in_one_line(bundle: Path, damage: str) -> None:
    path = bundle / ("onnx/block_1.data" if damage == "cut short" else PREFILL)
    path.write_bytes(path.read_bytes()[:1000])
    ran = debug(bundle)
    assert ran.code == 4 and "block_1" in ran.error()


# ------------------------------------------------------------------------------------------------------------------ refusals
def test_a_graph_that_is_not_loaded(bundle: Path) -> None:
    def rename(model: Any) -> None:
        next(n for n in model.graph.node if n.op_type == "Softmax").op_type = "Softmaxx"

    edit(bundle / PREFILL, rename)
    ran = debug(bundle)
    assert ran.code == 4 and "is not loaded by onnxruntime" in ran.out
    told = reported(bundle)
    assert told["kind"] == "load" and told["node"]["operator"] == "Softmaxx" and told["reduced_nodes"] == 1 and reproduces(bundle) != 0


def test_a_graph_that_is_not_run(good: Path, bundle: Path) -> None:
    def out_of_range(model: Any) -> None:
        gather = next(n for n in model.graph.node if n.op_type == "Gather")
        model.graph.initializer.append(numpy_helper.from_array(np.int64(99), "outside"))
        gather.input[1] = "outside"

    edit(bundle / PREFILL, out_of_range)
    for args in ((), ("--against", good)):
        ran = debug(bundle, *args)
        assert ran.code == 4, ran.err
        told = reported(bundle)
        assert (told["kind"], told["subgraph"]) == ("run", PREFILL) and told["node"]["operator"] == "Gather" and told["reduced_nodes"] == 1
    assert reproduces(bundle) != 0


# ---------------------------------------------------------------------------------------------- a fault of onnxruntime's own
def test_a_fault_of_a_fusion_is_shrunk_to_what_is_fused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a broken fusion: wrong where Sigmoid and the Mul behind it lie in one graph and nobody looks between them."""
    real = finding.execute

    def broken(path: Path, feed: Mapping[str, Any], *, optimised: bool = True, **more: Any) -> dict[str, Any]:
        found = real(path, feed, optimised=optimised, **more)
        nodes, outputs = load(path).graph.node, set(found)
        for node in nodes:
            fused = node.op_type == "Sigmoid" and node.output[0] not in outputs
            if optimised and fused and any(n.op_type == "Mul" and node.output[0] in n.input for n in nodes):
                return {name: value + 1 if value.dtype.kind == "f" else value for name, value in found.items()}
        return found

    monkeypatch.setattr(finding, "execute", broken)
    monkeypatch.setattr(localise, "execute", broken)
    fault = find(bundle, subgraph=PREFILL).fault
    assert fault is not None and fault.compared_with == finding.UNOPTIMISED and fault.kind == "parity"
    assert operators(fault.model) == ["Sigmoid", "Mul"] and fault.node.operator == "Mul" and len(fault.node.beside) == 1


# ------------------------------------------------------------------------------------------------------------------ mistakes
def test_mistakes_are_one_line(good: Path, bundle: Path, int4: Path, model: Path, tmp_path: Path) -> None:
    for args, says in [
        (("--subgraph", "onnx/block_1_prefil.onnx"), "did you mean 'onnx/block_1_prefill.onnx'"),
        (("--against", tmp_path / "nowhere"), "does not exist"),
        (("--recipe-folder", "."), "goes with --model"),
        (("--check", "parse", "--against", good), "compares nothing"),
        (("--tolerance", 0), "not in the range"),
    ]:
        ran = debug(bundle, *args)
        assert ran.code == 2 and says in ran.error(), ran.err
    ran = tmc("debug", int4)
    assert ran.code == 2 and "no recorded conversations" in ran.error()
    other = Path(shutil.copytree(good, tmp_path / "other"))
    (other / PREFILL).rename(other / "onnx" / "away.onnx")
    ran = debug(bundle, "--against", other)
    assert ran.code in (2, 4) and "block_1_prefill.onnx" in ran.error()
    (other / "onnx" / "away.onnx").rename(other / PREFILL)
    manifest = open_manifest(other)
    codes = SlotCodes(dtype="int8", scales={})
    write_manifest(other, manifest.model_copy(update={"program": manifest.program.model_copy(update={"kv": codes})}))
    ran = debug(bundle, "--against", other)
    assert ran.code == 2 and "keeps keys and values in float32" in ran.error() and "of the same quantize.kv" in ran.error()
    (bundle / PREFILL).unlink()
    ran = debug(bundle)
    assert ran.code == 4 and "is missing" in ran.error()


def test_nobodys_folder_is_replaced(good: Path, bundle: Path) -> None:
    target = bundle.parent / "fault"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    scale_weight(bundle, PREFILL, "down_proj")
    ran = debug(bundle, "--against", good, "--subgraph", PREFILL)
    assert ran.code == 2 and "fault.json" in ran.error() and [p.name for p in target.iterdir()] == ["thesis.txt"]
    (target / "thesis.txt").unlink()
    assert debug(bundle, "--against", good, "--subgraph", PREFILL).code == 4
    assert debug(bundle, "--against", good, "--subgraph", PREFILL).code == 4, "its own folder is replaced"
    assert {p.name for p in target.iterdir()} == {"model.onnx", "inputs.json", "expected.json", "fault.json"}
    assert {p.name for p in bundle.parent.iterdir()} == {"bundle", "fault"}
