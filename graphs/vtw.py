"""VTW: withdraw every visual token after some decoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage
from tmc_export.graphs._fitting import Evidence, Fitted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VTW"]


@register("vtw")
class VTW(Method):
    """VTW, visual tokens withdrawn: from layer K on the decoder goes on with text alone.

    Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025, arXiv:2405.05803.

    At the input of layer K (`at: decoder.<K>`): `tokens_out = {}`. What the picture had to say is in the text tokens by then.

    Shapes (b batch, n candidates, c channels): tokens `[b, n, c]` -> `[b, 0, c]`; `source` and `valid` `[b, 0]`. Positions are kept. The
    KV of layers below K stays whole; from K on it holds no visual row.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> stage, tokens, context = context_for(VTW, VTW.Config(), "decoder.15", seed=0)
    >>> VTW.apply(stage, tokens, context, VTW.Config()).tokens.shape
    torch.Size([1, 0, 96])

    Fitting (`tmc-export fit`): K is the first layer whose withdrawal changes the first answer token's distribution, over a few prompts on
    average, by less than `divergence`: `KL(withdrawn || whole)` in nats.

    Limits: K is the site; the paper takes 15 of 32 layers. No method can follow at a later layer, because nothing is left to compress.

    Where the official code differs: it cuts out a fixed span 35:611 of the prompt, one picture of 576 tokens; here whatever the candidates
    are. Its search computes the divergences from layer 5 on and leaves the bound to the reader; here it begins at layer 1, and the default
    of 0.003 is ours. Its second way of numbering positions (without gaps) is not offered: the released results keep them.
    """

    paper = "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference, AAAI 2025, arXiv:2405.05803"
    official = "lzhxmu/VTW@34a4199 llava/model/language_model/VTW.py:VTWLlamaModel.forward"
    mechanism = "attention"
    budgets = "the layer, found on a calibration set"
    sites = ("decoder.<k>",)
    fitted = ("at",)
    goals = {"divergence": 0.003}

    samples = (Sample("decoder.15"),)

    class Config(MethodConfig):
        """No options: the site says from which layer on."""

    @staticmethod
    def stages(at: Site, config: VTW.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut; at `decoder.0` the picture would never be seen, which is refused."""
        need_site("vtw", at, "decoder")
        if not 1 <= (at.layer or 0) < facts.decoder.layers:
            raise ValueError(
                f"vtw at {at} needs a decoder layer before and after the cut; use decoder.1 to decoder.{facts.decoder.layers - 1} "
                "(the paper: decoder.15 of 32)"
            )
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: VTW.Config, facts: ModelFacts) -> Layout:
        """No token."""
        return Layout((Segment("visual", 0),), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: VTW.Config) -> Compressed:
        """Keep nothing."""
        import torch

        none = torch.zeros(tokens.shape[0], 0, dtype=torch.int64)
        return Compressed(tokens[:, :0], none, context.valid[:, :0])

    @staticmethod
    def fit(config: VTW.Config, facts: ModelFacts, evidence: Evidence, goals: Mapping[str, float]) -> Fitted:
        """Find the first layer whose withdrawal stays below `goals["divergence"]`."""
        found: list[tuple[str, float]] = []
        for layer in range(1, facts.decoder.layers):
            site = Site("decoder", layer)
            found.append((str(site), evidence.divergence(site, {})))
            if found[-1][1] < goals["divergence"]:
                return Fitted(site, {}, ("at", "divergence"), tuple((name, f"{value:.6f}") for name, value in found))
        listed = ", ".join(f"{name} {value:.6f}" for name, value in found)
        raise ValueError(
            f"divergence: withdrawal stays below {goals['divergence']:g} at no layer ({listed or 'there is 1'}); ask for more than the "
            "lowest of these, or use another method"
        )
