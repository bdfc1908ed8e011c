"""EViT (a whole block, so attention and feed-forward are computed here) and DynamicViT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs.dynamicvit import DynamicViT, keep_log_probability
from tmc_export.graphs.evit import EViT

_PATCHES, _RATIOS = 196, (0.7, 0.49, 0.343)


def _norm(inputs: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[2],), inputs[f"W.{name}.weight"], inputs[f"W.{name}.bias"])


def _linear(inputs: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ inputs[f"W.{name}.weight"].T + inputs[f"W.{name}.bias"]


def _attended(inputs: Mapping[str, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """The block up to its attention's sum, and the class token's attention `[b, n]`."""
    x = inputs["x"]
    b, n, c = x.shape
    q, k, v = _linear(inputs, "attn.qkv", _norm(inputs, "norm1", x)).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * (c // heads) ** -0.5).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(b, n, c)
    return x + _linear(inputs, "attn.proj", out), weights[:, :, 0].mean(dim=1)


def _evit(case: Case) -> Program:
    p = case.params
    config = EViT.Config(keep=Budget(share=float(p.get("keep", 0.7))), layers=(0,), fuse=bool(p.get("fuse", False)))
    model, heads = facts(class_tokens=1), int(p.get("heads", 4))
    (stage,) = EViT.stages(Site.parse("encoder"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, score = _attended(inputs, heads)
        arriving = layout(tokens.shape[1], tokens.shape[2], class_tokens=1)
        out = EViT.apply(stage, tokens, context(tokens, arriving, model, {stage.needs[0]: score}), config)
        x = out.tokens
        x = x + _linear(inputs, "mlp.fc2", functional.gelu(_linear(inputs, "mlp.fc1", _norm(inputs, "norm2", x))))
        last = -1 if config.fuse else out.source.shape[1]
        found = {"x": x, "idx": out.source[:, 1:last] - 1}
        return {name: value for name, value in found.items() if name in case.outputs}

    return Program({name: case.tensor(name) for name in case.inputs}, run)


def _dynamicvit(case: Case) -> Program:
    p, model = case.params, facts(encoder_layers=12, class_tokens=1)
    ratios, index = [float(r) for r in p.get("ratios", _RATIOS)], int(p.get("stage", 0))
    config = DynamicViT.Config(keep=tuple(Budget(share=r) for r in ratios))
    stage = DynamicViT.stages(Site.parse("encoder"), config, model)[index]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, own = inputs["x"], {name[2:]: value for name, value in inputs.items() if name.startswith("W.")}
        arriving = replace(layout(tokens.shape[1], tokens.shape[2], class_tokens=1), entry_tokens=int(p.get("patches", _PATCHES)))
        weights = {f"score_predictor.{index}.{name}": value for name, value in own.items()}
        here = replace(context(tokens, arriving, model), weights=weights)
        out = DynamicViT.apply(stage, tokens, here, config)
        score = keep_log_probability(tokens[:, 1:], here.valid[:, 1:], own)
        return {"x": out.tokens, "keep": out.source[:, 1:] - 1, "score": score}

    return Program({name: case.tensor(name) for name in case.inputs}, run)


def build(case: Case) -> Program:
    if "W.attn.qkv.weight" in case.inputs:
        return _evit(case)
    if "W.in_conv.0.weight" in case.inputs:
        return _dynamicvit(case)
    raise NotCovered("selection inside an audio transformer, of the issue for audio")
