"""What a run of the modules in PyTorch may put in the place of what they compute: an earlier run's choices, and rounded keys and values.

Traced graphs know none of it: outside of the contexts here nothing changes.

Legend: b batch, n candidates, k tokens that leave, c channels, g KV heads, T tokens, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Compressed
from tmc_export.plan.types import StagePlan

__all__ = ["Choices", "Kind", "SlotRounding", "choose", "replaying", "round_slots", "rounded_slots", "writing_down"]

Kind = Literal["rows", "mix", "none"]
"""What a stage's choice is: rows of the candidates, a linear map of them, or nothing that could be held (learned tokens, a maximum)."""

SlotRounding = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Decoder layer, new keys and values `[b, g, T, d]` → both as the slots give them back."""

_NEAR = 1e-4
"""How far `mix @ candidates` may be from the tokens, of their largest magnitude, and still be what the method does."""


@dataclass
class Choices:
    """What the stages chose in the run of one prompt.

    Attributes:
        made: stage → what it returned, its tokens left out, in the order of the calls.
        kinds: stage → what its choice is; of several calls the weakest.
        plain: no stage hands anything on but rows: with the same rows kept, a run with held choices is the free one.
    """

    made: dict[str, list[tuple[Kind, Compressed]]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    plain: bool = True

    def write_down(self, stage: str, tokens: Tensor, result: Compressed) -> None:
        """Add a result for the candidates `[b, n, c]`."""
        kind = _kind(tokens, result)
        before = self.kinds.get(stage, kind)
        self.kinds[stage] = kind if before == kind else "none" if "none" in (before, kind) else "mix"
        self.plain = self.plain and kind == "rows" and not result.state and not result.kv and result.key_bias is None
        self.made.setdefault(stage, []).append((kind, replace(result, tokens=result.tokens[:, :0])))


@dataclass
class _Writing:
    choices: Choices


@dataclass
class _Replaying:
    choices: Choices
    next: dict[str, int] = field(default_factory=dict)


_CHOICES: ContextVar[_Writing | _Replaying | None] = ContextVar("tmc_choices", default=None)
_SLOTS: ContextVar[SlotRounding | None] = ContextVar("tmc_slots", default=None)


@contextmanager
def writing_down(choices: Choices) -> Iterator[None]:
    """While active, every stage that runs adds to `choices`."""
    with _set(_Writing(choices)):
        yield


@contextmanager
def replaying(choices: Choices) -> Iterator[Callable[[], None]]:
    """While active, every stage does to its candidates what it did in another run of the same prompt.

    Indices, maps, states and biases are that run's, tokens come from the candidates as they are now. Gives a function that begins anew.
    """
    state = _Replaying(choices)
    with _set(state):
        yield state.next.clear


@contextmanager
def _set(state: _Writing | _Replaying) -> Iterator[None]:
    token = _CHOICES.set(state)
    try:
        yield
    finally:
        _CHOICES.reset(token)


def choose(plan: StagePlan, tokens: Tensor, apply: Callable[[], Compressed]) -> Compressed:
    """Run a stage on `[b, n, c]`, or repeat what it chose, as the context in force says.

    Raises:
        ExportError: the other run made fewer calls, or saw other candidates.
    """
    state = _CHOICES.get()
    if state is None:
        return apply()
    stage = f"{plan.method} at {plan.stage.at} ({plan.entry}.{plan.stage.index})"
    if isinstance(state, _Writing):
        result = apply()
        state.choices.write_down(stage, tokens, result)
        return result
    number = state.next.get(stage, 0)
    state.next[stage] = number + 1
    made = state.choices.made.get(stage, [])
    if number >= len(made):
        raise ExportError(f"{stage}: the run whose choices are held made {len(made)} calls, this is one more; replay the same prompt")
    kind, held = made[number]
    return apply() if kind == "none" else replace(held, tokens=_repeat(kind, tokens, held).to(tokens.dtype))


def _kind(tokens: Tensor, result: Compressed) -> Kind:
    if result.text is not None or result.tokens.shape[-1] != tokens.shape[-1]:
        return "none"
    real, alive = result.source >= 0, result.valid
    same = (result.tokens == _repeat("rows", tokens, result)).all(-1) & real
    if bool(same[alive].all()):
        return "rows"
    if result.mix is None:
        return "none"
    off = (_repeat("mix", tokens, result) - result.tokens.float()).abs()[alive]
    return "mix" if not off.numel() or bool(off.max() <= _NEAR * result.tokens.abs().max()) else "none"


def _repeat(kind: Kind, tokens: Tensor, held: Compressed) -> Tensor:
    if kind == "rows" or held.mix is None:
        index = held.source.clamp(min=0)
        return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
    if held.mix.shape[2] != tokens.shape[1]:
        raise ExportError(f"a held map takes {held.mix.shape[2]} candidates, {tokens.shape[1]} arrive; replay the same prompt")
    return held.mix.float() @ tokens.float()


@contextmanager
def rounded_slots(how: SlotRounding) -> Iterator[None]:
    """While active, attention sees new keys and values rounded by `how`, and records them so."""
    token = _SLOTS.set(how)
    try:
        yield
    finally:
        _SLOTS.reset(token)


def round_slots(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return new keys and values `[b, g, T, d]` as the context in force wants them."""
    how = _SLOTS.get()
    return (key, value) if how is None else how(layer, key, value)
