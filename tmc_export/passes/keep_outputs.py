"""Give every graph output a value and the name of its own.

Before: a pass found that two outputs are equal, and the graph now returns one value twice, `kv.1, kv.1`. After: `kv.0, kv.1`, one of them
copied by an Identity. The same for an output that is an input. A value inside that has an output's name gives it up.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes

__all__ = ["KeepOutputsPass", "output_names"]


def output_names(model: ir.Model) -> list[str]:
    """Names of a graph's outputs, in order; to be taken before passes run."""
    return [value.name or "" for value in model.graph.outputs]


class KeepOutputsPass(ir.passes.InPlacePass):
    """Restore the outputs' names, with an Identity where one value stands for two outputs.

    Args:
        names: of the outputs, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether a name or a node is new."""
        graph, taken, modified = model.graph, set(), False
        right = {id(v) for v, name in zip(graph.outputs, self.names, strict=True) if v.name == name}
        for value in (out for node in graph for out in node.outputs):
            if value.name in self.names and id(value) not in right:  # the name is wanted for another value
                value.name = f"{value.name}/was"
                modified = True
        for index, (value, name) in enumerate(zip(list(graph.outputs), self.names, strict=True)):
            produced = value.producer() is not None
            if value.name == name and (produced or value.is_initializer()) and id(value) not in taken:
                taken.add(id(value))
                continue
            if produced and id(value) not in taken and value.name not in self.names:
                value.name = name
                taken.add(id(value))
                modified = True
                continue
            copy = ir.node("Identity", [value])
            copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].type = name, value.shape, value.type
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
            taken.add(id(copy.outputs[0]))
            modified = True
        return ir.passes.PassResult(model, modified)
