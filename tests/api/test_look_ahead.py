"""A stage in the encoder gets what it asks for: attention and keys of the layer to come, products before softmax, one joined head.

The probe weighs its tokens with what it was given, so that the build's own comparison with the reference sees a wrong capture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._tiny import RECIPE
from tests.families._small import save_small_llava
from tmc_export.api import build
from tmc_export.core.errors import LegalityError, TmcError
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Compressed, Context, Keys, Layout, Method, MethodConfig, Segment, Site, Stage
from tmc_export.surgery.vision import VisionTrace

KEEP = 6


class Probe(Method):
    """The first tokens, each times one plus what was captured for it."""

    name = "probe"
    paper = official = "none"
    mechanism = "control"
    sites = ("encoder", "encoder.<l>", "encoder.<l>.mid")

    class Config(MethodConfig):
        layer: str = "next"
        heads: str = "mean"
        rows: str = "cls"
        logits: bool = False
        keys: bool = False

    @staticmethod
    def stages(at: Site, config: Any, facts: ModelFacts) -> tuple[Stage, ...]:
        need: Any = Keys(layer=config.layer) if config.keys else Attention(config.layer, config.rows, config.heads, logits=config.logits)
        return (Stage(at, (need,)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Any, facts: ModelFacts) -> Layout:
        return Layout((Segment("class", 1), Segment("visual", KEEP - 1)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Any) -> Compressed:
        (found,) = context.captured.values()
        weight = found.flatten(2).sum(-1) if config.keys else found.amax(1) if config.heads == "none" else found
        source = torch.arange(KEEP).expand(tokens.shape[0], KEEP)
        return Compressed(tokens[:, :KEEP] * (1 + weight[:, :KEEP, None].to(tokens.dtype)), source, context.valid[:, :KEEP])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fastv" in METHODS  # loads the library before its table is changed
    monkeypatch.setitem(METHODS._items, "probe", Probe)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three encoder layers, of which LLaVA's feature layer -2 uses two."""
    return save_small_llava(tmp_path_factory.mktemp("ahead") / "model", layers=2, vision_layers=3, hidden=32, image_size=42)


def built(model: Path, out: Path, at: str, options: Mapping[str, Any]) -> None:
    entry = json.dumps({"at": at, "method": "probe", **options})
    text = RECIPE.replace("./model", str(model)).replace("{at: decoder.1, method: fastv, keep: 4}", entry)
    (out / "recipe.yaml").write_text(text, "utf-8")
    build(out / "recipe.yaml", out / "bundle", engines=False)


def _id(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


QUICK: list[tuple[str, dict[str, Any]]] = [
    ("encoder", {"heads": "joined"}),
    ("encoder", {"keys": True}),
    ("encoder.1.mid", {"layer": "previous", "logits": True}),
]
SLOW: list[tuple[str, dict[str, Any]]] = [
    ("encoder", {}),
    ("encoder", {"logits": True}),
    ("encoder", {"logits": True, "heads": "none"}),
    ("encoder", {"rows": "all", "heads": "max"}),
    ("encoder.1", {"heads": "joined"}),
    ("encoder", {"layer": "previous", "heads": "joined"}),
]
CASES = [pytest.param(*case, id=_id(case)) for case in QUICK]
CASES += [pytest.param(*case, id=_id(case), marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("at", "options"), CASES)
def test_bundle_equals_reference(model: Path, tmp_path: Path, at: str, options: dict[str, Any]) -> None:
    built(model, tmp_path, at, options)


def test_the_wrong_layer_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: an export that looks at another layer than the reference does not pass its build."""
    ahead = VisionTrace.look_ahead
    monkeypatch.setattr(VisionTrace, "look_ahead", lambda self, parts, needs, layer: ahead(self, parts, needs, layer - 1))
    with pytest.raises(TmcError, match="differ|parity|reference"):
        built(model, tmp_path, "encoder", {"heads": "joined"})


def test_no_layer_to_come_is_refused(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples" / "tiny-llava"  # its feature layer is the last one
    with pytest.raises(LegalityError, match="all 4 layers of this checkpoint are in use; ask for the layer before"):
        built(examples, tmp_path, "encoder", {})
    with pytest.raises(LegalityError, match="no whole layer to come"):
        built(examples, tmp_path, "encoder.1.mid", {})
