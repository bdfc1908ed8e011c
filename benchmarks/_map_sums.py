"""What it costs a decoder layer to add up rows of its own attention map: its attention with the sums, and without.

Where a method scores with sums over all rows, the block before the cut makes them (`plan.sums`). The selector's time then is that of its
compress graphs and the difference between these two, which are timed in the same rounds.

Legend: S tokens of the prompt, h heads, g key-value heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tmc_export.core.facts import DecoderFacts
    from tmc_export.graphs._contract import Attention

__all__ = ["BARE", "SUMMED", "save_pair"]

SUMMED, BARE = "attention with its sums", "attention without"


def save_pair(folder: Path, label: str, layers: Sequence[tuple[int, int, Sequence[Attention]]], d: DecoderFacts) -> None:
    """Write `<label>-<SUMMED>.onnx` and `<label>-<BARE>.onnx`, their inputs beside them.

    Args:
        folder: where to.
        label: of the selector.
        layers: per scored layer its visual tokens, its text tokens, and the sums.
        d: the decoder.
    """
    for kind in (SUMMED, BARE):
        _save(folder / f"{label}-{kind}.onnx", layers, d, kind == SUMMED)


def _save(path: Path, layers: Sequence[tuple[int, int, Sequence[Attention]]], d: DecoderFacts, summed: bool) -> None:
    import numpy as np
    import onnx_ir as ir
    import torch

    from tmc_export.export.capture import capture
    from tmc_export.passes.pipeline import clean, finish, specialize
    from tmc_export.surgery._sums import members_of
    from tmc_export.surgery.attention import AttentionState, additive_mask, recording, static_attention

    given: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for number, (visual, text, _) in enumerate(layers):
        count = visual + text
        given[f"query.{number}"] = torch.randn(1, d.heads, count, d.head_dim, generator=draw) * 0.3
        for side in ("key", "value"):
            given[f"{side}.{number}"] = torch.randn(1, d.kv_heads, count, d.head_dim, generator=draw)
        given[f"order.{number}"] = torch.arange(count)[None]
        given[f"valid.{number}"] = torch.ones(1, count, dtype=torch.bool)
        given[f"text.{number}"] = (torch.arange(count) >= visual)[None]
    names = list(given)

    class Graph(torch.nn.Module):
        def forward(_, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: N805
            x, out = dict(zip(names, tensors, strict=True)), []
            for number, (_visual, _text, needs) in enumerate(layers):
                order, valid, key = x[f"order.{number}"], x[f"valid.{number}"], x[f"key.{number}"]
                state = AttentionState(
                    past={0: (key[:, :, :0], key[:, :, :0])}, masks={0: additive_mask(order, order, valid, None, torch.float32)},
                    summed={0: tuple(needs)} if summed else {}, member=members_of(valid, x[f"text.{number}"]),
                )  # fmt: skip
                with recording(state):
                    mixed, _ = static_attention(
                        SimpleNamespace(layer_idx=0, head_dim=d.head_dim), x[f"query.{number}"], key, x[f"value.{number}"], None
                    )
                out += [mixed, *state.sums.get(0, {}).values()]
            return tuple(out)

    count = sum(1 + (len(needs) if summed else 0) for _, _, needs in layers)
    traced: Any = capture(
        Graph(), list(given.values()), input_names=names, output_names=[f"out/{n}" for n in range(count)], symbols=[None] * len(names),
        model=torch.nn.Module(), checkpoint=_Nothing(),
    )  # fmt: skip
    static = specialize(clean(traced), {}, path.stem, causal=True)
    finish(static)
    ir.save(static, path)
    np.savez(path.with_suffix(".npz"), **{n: value.numpy() for n, value in given.items()})


class _Nothing:
    """A checkpoint of no weights."""

    def read(self, name: str) -> Any:
        raise KeyError(name)
