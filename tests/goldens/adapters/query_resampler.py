"""The query resamplers in one file: LLaVA-Mini's compressor, VoCo's mask, LLaMA-VID's tokens, BLIP-2's Q-Former, by the name of the case.

The files name no heads and no id of `<voco>`: 4 heads and the id 7 were found by comparing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout, square
from tmc_export.graphs._contract import Site
from tmc_export.graphs._resampler import resample_by_queries
from tmc_export.graphs.llama_vid import LlamaVid
from tmc_export.graphs.q_former import QFormer, query_outputs
from tmc_export.graphs.voco import phases, visible

_HEADS, _VOCO = 4, 7


def build(case: Case) -> Program:
    kinds = {"llavamini": _llava_mini, "voco": _voco, "llamavid": _llama_vid, "qformer": _q_former}
    kind = case.name.split("_")[0]
    if kind not in kinds:
        raise NotCovered(f"no method for cases named {kind}")
    return kinds[kind](case)


def _inputs(case: Case) -> dict[str, Tensor]:
    return {name: case.tensor(name) for name in case.inputs}


def _llava_mini(case: Case) -> Program:
    """The compressor alone: the golden's has a `kv_proj`, because its picture is narrower than its queries."""
    heads, queries = int(case.params.get("heads", _HEADS)), square(case.inputs["W.query"].shape[0])

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        weights = {name.replace("W.", "compressor.", 1): value for name, value in inputs.items()}
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        y, attention = resample_by_queries(x, valid, square(x.shape[1]), weights, "compressor", queries, heads, 1e-5)
        return {"y": y, "attn": attention}

    return Program(_inputs(case), run)


def _voco(case: Case) -> Program:
    voco = int(case.params.get("voco_token", _VOCO))

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        phase = phases(inputs["ids"] == voco)
        return {"mask": visible(phase.unsqueeze(2), phase.unsqueeze(1)).unsqueeze(1).int()}

    return Program(_inputs(case), run)


def _llama_vid(case: Case) -> Program:
    """The golden starts at the text queries, so their projection is the identity; it has no biases, and one linear projector."""
    kind = str(case.params["ctype"])
    config = LlamaVid.Config(grid=int(kind.split(":")[1]) if kind.startswith("grid:") else 1, projector="linear")
    if not kind.startswith(("grid:", "mean")):
        raise NotCovered(f"compress_type {kind} keeps every patch")
    model = facts()
    first, second = LlamaVid.stages(Site.parse("projector.replace"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        vis, text = inputs["vis"], inputs["text_q"]
        weights = {
            "vlm_att_projector.weight": torch.eye(text.shape[2]),
            "vlm_att_key_projector.weight": inputs["wk"],
            "vlm_att_val_projector.weight": inputs["wv"],
            "mm_projector.weight": inputs["wp"],
        }
        here = context(vis, layout(vis.shape[1], vis.shape[2], grid=square(vis.shape[1])), model)
        content = LlamaVid.apply(first, vis, replace(here, weights=weights), config)
        here = context(content.tokens, layout(content.tokens.shape[1], content.tokens.shape[2]), model, state=content.state)
        here = replace(here, text=text, text_valid=torch.ones(text.shape[:2], dtype=torch.bool), weights=weights)
        return {"tokens": LlamaVid.apply(second, content.tokens, here, config).tokens}

    return Program(_inputs(case), run)


def _q_former(case: Case) -> Program:
    """The module before the language projection, which the golden has not."""
    layers = 1 + max(int(name.split(".")[3]) for name in case.inputs if name.startswith("W.encoder.layer."))
    crossing = [i for i in range(layers) if f"W.encoder.layer.{i}.crossattention.output.dense.weight" in case.inputs]
    config = QFormer.Config(
        queries=case.inputs["q"].shape[1],
        width=case.inputs["q"].shape[2],
        layers=layers,
        heads=int(case.params.get("heads", _HEADS)),
        cross_attention_frequency=crossing[1] if len(crossing) > 1 else layers,
    )

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        weights = {name.replace("W.", "qformer.", 1): value for name, value in inputs.items() if name.startswith("W.")}
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        return {"y": query_outputs(x, valid, weights | {"query_tokens": inputs["q"]}, config)}

    return Program(_inputs(case), run)
