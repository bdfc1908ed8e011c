"""Convolutional projectors: LDP, LDPv2 and the C-Abstractor; which one the weights say."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import square
from tests.goldens.adapters._learned import all_inputs, model_of, projected, same_weights
from tmc_export.graphs._contract import Method, MethodConfig, Site
from tmc_export.graphs.c_abstractor import CAbstractor
from tmc_export.graphs.ldp import Ldp
from tmc_export.graphs.ldp_v2 import LdpV2


def build(case: Case) -> Program:
    x = case.tensor("x")
    if "kind" in case.params or x.dim() != 3:
        raise NotCovered("a connector over the frames of a video")
    method, config, last = _method(case)
    grid = square(x.shape[1])
    model = model_of(x.shape[2], case.tensor(last).shape[0], grid)
    same_weights(method, config, model, case)
    (stage,) = method.stages(Site.parse("projector.replace"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y": projected(method, stage, config, model, grid, inputs)}

    return Program(all_inputs(case), run)


def _method(case: Case) -> tuple[type[Method], MethodConfig, str]:
    """The method, its options, and the weight whose rows are the channels that leave."""
    if "W.peg.peg.0.weight" in case.inputs:
        return LdpV2, LdpV2.Config(), "W.mlp.mlp.2.weight"
    if "W.model.mlp.1.weight" in case.inputs:
        return Ldp, Ldp.Config(), "W.model.mlp.3.weight"
    if "W.readout.0.weight" in case.inputs:
        return CAbstractor, _abstractor(case), "W.readout.0.weight"
    raise NotCovered("another projector than LDP, LDPv2 and the C-Abstractor")


def _abstractor(case: Case) -> CAbstractor.Config:
    names = set(case.inputs)
    depth = sum(f"W.net.0.b{index + 1}.conv1.conv.weight" in names for index in range(len(names)))
    eos = case.inputs["W.eos_tokens"].shape[1] if "W.eos_tokens" in names else 0
    queries = int(case.params.get("q", case.outputs["y"].shape[1] - eos))
    return CAbstractor.Config(
        grid=square(queries),
        hidden=case.inputs["W.net.0.b1.conv1.conv.weight"].shape[0] if depth else 1,
        depth=depth,
        mlp_depth=sum(name.startswith("W.readout.") and name.endswith(".weight") for name in names),
        pos_emb="W.pos_emb" in names,
        prenorm="W.prenorm.weight" in names,
        eos_tokens=eos,
    )
