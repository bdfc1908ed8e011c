"""What the adapters of learned modules share: their weights, and facts that make our names and shapes those of the golden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tests.goldens._cases import Case
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Context, Method, MethodConfig, Stage

PREFIX = "W."


def all_inputs(case: Case) -> dict[str, Tensor]:
    return {name: case.tensor(name) for name in case.inputs}


def weights_in(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their official names."""
    return {name.removeprefix(PREFIX): value for name, value in inputs.items() if name.startswith(PREFIX)}


def model_of(arriving: int, leaving: int, grid: tuple[int, int]) -> ModelFacts:
    """Facts of a model whose projector maps `arriving` to `leaving` channels on `grid`."""
    made = facts()
    encoder = replace(made.encoder, width=arriving, class_tokens=0, grid=grid)
    return replace(made, encoder=encoder, decoder=replace(made.decoder, width=leaving))


def same_weights(method: type[Method], config: MethodConfig, model: ModelFacts, case: Case) -> None:
    """Fail unless the method declares exactly the golden's weights: names and shapes are those of the official state dict."""
    declared = {name: tuple(shape) for name, shape in method.weights(config, model).items()}
    official = {name: tuple(value.shape) for name, value in weights_in(all_inputs(case)).items()}
    differ = sorted({*declared.items()} ^ {*official.items()})
    assert not differ, f"{method.name} declares other weights than {case.id}: {differ}"


def projector_context(tokens: Tensor, grid: tuple[int, int], model: ModelFacts, inputs: Mapping[str, Tensor]) -> Context:
    """A context at `projector.replace` with the golden's weights."""
    arriving = layout(tokens.shape[1], tokens.shape[2], grid=grid)
    return replace(context(tokens, arriving, model), weights=weights_in(inputs))


def projected(
    method: type[Method], stage: Stage, config: MethodConfig, model: ModelFacts, grid: tuple[int, int], inputs: Mapping[str, Tensor]
) -> Tensor:
    """The method's tokens for input `x` `[b, n, c]`."""
    x = inputs["x"]
    return method.apply(stage, x, projector_context(x, grid, model, inputs), config).tokens
