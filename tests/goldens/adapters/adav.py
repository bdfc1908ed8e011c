"""AdaFV's published code: the choice with its duplicates, and the split of a budget alone.

The method fills the place of a duplicate; the golden keeps it, so the indices are put together here from the method's own scores, lists and
split. With several pictures the official code adds the picture's number to the places of the class attention, where 576 times that was
meant: the lists of that case are put together here as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs._ops import gather, top_in_order
from tmc_export.graphs.adafv import AdaFV, balance, text_score, times_picked

_FLOOR = 0.25


def build(case: Case) -> Program:
    if "v" in case.inputs:
        return _split(int(case.params["K"]))(case)
    return _whole(case)


def _split(budget: int):  # type: ignore[no-untyped-def]
    def build_split(case: Case) -> Program:
        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            first, second = (inputs[name].unsqueeze(0).sort(dim=1, descending=True).values for name in ("v", "vc"))
            a = balance(first, second, budget)[0]
            return {"k1": a, "k2": budget - a}

        return Program({name: case.tensor(name) for name in ("v", "vc")}, run)

    return build_split


def _whole(case: Case) -> Program:
    pictures, each = case.inputs["cls_attn"].shape
    start, n = int(case.params.get("start", 35)), pictures * each
    per_picture = int(int(int(case.params["tokens"]) / 2) / pictures)
    k = 2 * per_picture * pictures
    floor = int(k * _FLOOR)
    config, model = AdaFV.Config(keep=Budget(tokens=k), floor=_FLOOR), facts(class_tokens=1)
    stage = AdaFV.stages(Site.parse("decoder.0"), config, model)[1]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        embeds = inputs["embeds"]
        tokens, text = embeds[:, start : start + n], embeds[:, start + n :]
        here = context(tokens, layout(n, tokens.shape[2]), model)
        similarity = text_score(tokens, text, torch.ones(text.shape[:2], dtype=torch.bool), here.valid)
        attention = inputs["cls_attn"]
        if pictures == 1:
            named = times_picked(similarity, attention, k, floor, here.valid)
            indices = _repeated(named, k)
        else:
            indices = _with_the_wrong_offset(similarity, attention, k, floor, 2 * per_picture)
        joined = torch.cat([embeds[:, :start], gather(tokens, indices), embeds[:, start + n :]], dim=1)
        return {"indices": indices, "embeds": joined, "simi": similarity}

    def details(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The method keeps every token that the official code names, when one picture is asked about."""
        if pictures > 1:
            return {}
        out = run(inputs)
        tokens, text = inputs["embeds"][:, start : start + n], inputs["embeds"][:, start + n :]
        here = context(tokens, layout(n, tokens.shape[2]), model, state={"attention": inputs["cls_attn"]})
        with_text = type(here)(**{**vars(here), "text": text, "text_valid": torch.ones(text.shape[:2], dtype=torch.bool)})
        kept = set(AdaFV.apply(stage, tokens, with_text, config).source[0].tolist())
        assert set(out["indices"][0].tolist()) <= kept and len(kept) == k
        return {}

    return Program({name: case.tensor(name) for name in ("embeds", "cls_attn")}, run, details=details)


def _repeated(named: Tensor, k: int) -> Tensor:
    """Every candidate `[1, n]` as often as it is named, ascending: place j holds the first one whose running count exceeds j."""
    before = named.cumsum(dim=1).unsqueeze(1) <= torch.arange(k).reshape(1, k, 1)
    return before.long().sum(dim=2)


def _with_the_wrong_offset(similarity: Tensor, attention: Tensor, k: int, floor: int, each: int) -> Tensor:
    """The official lists for several pictures: `each` best of every picture one after another, with the picture's number added."""
    text_places = top_in_order(similarity, k)
    class_places = top_in_order(attention, each)
    class_values = gather(attention, class_places).reshape(1, -1)
    class_places = (class_places + torch.arange(attention.shape[0]).unsqueeze(1)).reshape(1, -1)
    rest = class_values[:, floor:]
    order = top_in_order(rest, rest.shape[1])
    a = balance(gather(similarity, text_places)[:, floor:], gather(rest, order), k - 2 * floor).unsqueeze(1)
    class_places = torch.cat([class_places[:, :floor], gather(class_places[:, floor:], order)], dim=1)
    place = torch.arange(k).unsqueeze(0)
    picked = torch.where(place < a + floor, text_places, gather(class_places, (k - 1 - place).clamp(max=k - 1)))
    return gather(picked, top_in_order(-picked.float(), k))
