"""What was found: the failing subgraph, the node at fault and the smallest model that still fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Fault", "Kind", "NodeFault"]

Kind = Literal["load", "run", "parity", "parse", "build"]


@dataclass(frozen=True)
class NodeFault:
    """The first node whose output is wrong, or which is refused.

    Attributes:
        name, operator: as in the graph; the operator with its domain where that is not ONNX's own.
        output: the tensor.
        error: largest absolute difference; None where nothing could be computed.
        allowed: what was allowed.
        note: the difference in words.
        weights: initializers that it or the nodes cut out with it read.
        differing: those of them that hold other values in the good graph.
        beside: operator and name of the nodes cut out with it: what it reads has no value of its own to be judged by.
    """

    name: str
    operator: str
    output: str
    error: float | None = None
    allowed: float | None = None
    note: str = ""
    weights: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """A subgraph that fails.

    Attributes:
        subgraph: the bundle's file.
        kind: `load` and `run` are onnxruntime's refusals, `parse` and `build` TensorRT-RTX's, `parity` a difference.
        why: the refusal, or the output that differs.
        compared_with: what is taken to be right; empty for refusals.
        node: the node at fault.
        nodes: of the subgraph.
        model: the reduced `onnx.ModelProto`, its weights not loaded.
        weights: folder of its weight files.
        feed: inputs of the reduced model.
        want: outputs that it should have.
        changed: files of the bundle that are not what was built (sha256).
    """

    subgraph: str
    kind: Kind
    why: str
    compared_with: str
    node: NodeFault
    nodes: int
    model: Any
    feed: Mapping[str, Array] = field(default_factory=dict)
    want: Mapping[str, Array] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @property
    def left(self) -> int:
        """Nodes of the reduced model."""
        return len(self.model.graph.node)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        node = self.node
        finite = node.error is not None and node.error != float("inf")
        return {
            "subgraph": self.subgraph,
            "kind": self.kind,
            "why": self.why,
            "compared_with": self.compared_with,
            "node": {
                "name": node.name,
                "operator": node.operator,
                "output": node.output,
                "error": node.error if finite or node.error is None else str(node.error),
                "allowed": node.allowed,
                "note": node.note,
                "weights": list(node.weights),
                "differing_weights": list(node.differing),
                "beside": list(node.beside),
            },
            "nodes": self.nodes,
            "reduced_nodes": self.left,
            "changed_files": list(self.changed),
        }

    def text(self) -> str:
        """Say it in a few lines."""
        node = self.node
        verb = {"parity": "differs", "load": "is not loaded by onnxruntime", "run": "is not run by onnxruntime"}
        lines = [f"{self.subgraph} {verb.get(self.kind, f'does not {self.kind} with TensorRT-RTX')}: {self.why}"]
        if self.compared_with:
            lines.append(f"  compared with {self.compared_with}")
        if self.changed:
            lines.append(f"  not as built (sha256): {', '.join(self.changed)}")
        first = "first wrong node" if self.kind == "parity" else "refused at"
        lines.append(f"  {first}: {node.name or 'a node without a name'} ({node.operator}), output {node.output} {node.note}".rstrip())
        if node.beside:
            lines.append(f"  with it, and not to be told apart from it: {', '.join(node.beside)}")
        if node.weights:
            lines.append(f"  weights: {', '.join(node.weights)}")
        if node.differing:
            lines.append(f"  other values in the good graph: {', '.join(node.differing)}")
        lines.append(f"  reduced from {self.nodes} nodes to {self.left}")
        return "\n".join(lines)
