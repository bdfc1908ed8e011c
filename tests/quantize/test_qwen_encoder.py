"""Qwen's patch embedding: a convolution's kernel that is read as a matrix. Schemes store it, `keep` names it, its input stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.families._small import save_small_qwen2_vl  # noqa: E402
from tmc_export.api.bundling import build_bundle  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

RECIPE = """recipe: 1
name: qwen
model: {{source: ./model, dtype: float32}}
inputs: {{images: 1, text_tokens: 32, new_tokens: 8, chunk: 8, image_size: [56, 56]}}
compress: []
quantize: {{encoder: {{weights: int8, activations: int8{keep}}}, calibration: {{images: pictures, prompts: prompts.jsonl}}}}
target: {{device: cpu, runtime: onnxruntime}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("qwen")
    save_small_qwen2_vl(folder / "model", layers=1, vision_layers=1)
    (folder / "pictures").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)).save(folder / "pictures" / "0.png")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "what is it"}) + "\n", "utf-8")
    return folder


def embedding(home: Path, name: str, keep: str = "") -> tuple[ir.DataType, bool]:
    """Build; returns how the patch embedding's weights are stored, and whether its input is rounded."""
    path = home / f"{name}.yaml"
    path.write_text(RECIPE.format(keep=keep), "utf-8")
    model = ir.load(build_bundle(path, home / name, record=False, engines=False).folder / "onnx" / "vision_0.onnx")
    (stored,) = [v for n, v in model.graph.initializers.items() if "patch_embed.proj.weight" in n and len(v.shape or ()) == 2]
    assert stored.shape == (3 * 2 * 14 * 14, 32) and stored.dtype is not None
    product = next(n for n in model.graph if n.op_type == "MatMul")  # the first one is the embedding
    source = product.inputs[0]
    maker = None if source is None else source.producer()
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph) >= 4  # those of the layer
    return stored.dtype, maker is not None and maker.op_type == "DequantizeLinear"


def test_it_is_stored_and_its_input_stays(home: Path) -> None:
    assert embedding(home, "all") == (ir.DataType.INT8, False)


def test_keep_names_it(home: Path) -> None:
    assert embedding(home, "kept", ", keep: [patch_embed]") == (ir.DataType.FLOAT, False)
