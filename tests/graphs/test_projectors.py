"""The learned projectors beyond their goldens: rasters that are not square, where tokens come from, padding, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Segment, Site, Stage
from tmc_export.graphs._raster import line_matrix
from tmc_export.graphs._synthetic import FACTS
from tmc_export.graphs.c_abstractor import CAbstractor
from tmc_export.graphs.ldp import Ldp
from tmc_export.graphs.ldp_v2 import LdpV2
from tmc_export.graphs.patch_merger import PatchMerger
from tmc_export.graphs.pixel_unshuffle import PixelUnshuffle

AT = Site.parse("projector.replace")
STAGE = Stage(AT)
PROJECTORS = ("pixel_unshuffle", "patch_merger", "ldp", "ldp_v2", "c_abstractor")


def _layout(grid: tuple[int, int], width: int = 32) -> Layout:
    return Layout((Segment("visual", grid[0] * grid[1], grid),), width)


def _unshuffled(order: str, grid: tuple[int, int], valid: Tensor | None = None) -> Compressed:
    """Patches that hold their own index, joined two by two and handed as they are."""
    n = grid[0] * grid[1]
    config = PixelUnshuffle.Config(order=order, projection="idefics3")
    seen = torch.ones(1, n, dtype=torch.bool) if valid is None else valid
    weights = {"modality_projection.proj.weight": torch.eye(4)}
    context = Context(_layout(grid, 1), FACTS, seen, torch.arange(n).unsqueeze(0), weights=weights)
    return PixelUnshuffle.apply(STAGE, torch.arange(n).float().reshape(1, n, 1), context, config)


def test_unshuffle_by_hand() -> None:
    # 0 1 2 3 / 4 5 6 7 / 8 ... 11 / 12 ... 15 / 16 ... 19 / 20 ... 23: the first block is 0 1 4 5, its right neighbour 2 3 6 7
    out = _unshuffled("v2", (6, 4))
    first, second = [0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]
    assert out.tokens[0, :3].tolist() == [first, second, [8.0, 9.0, 12.0, 13.0]]
    # v1 goes down the columns first: below the first block is 8 9 12 13, then 16 17 20 21
    assert _unshuffled("v1", (6, 4)).tokens[0, :4].tolist() == [first, [8.0, 9.0, 12.0, 13.0], [16.0, 17.0, 20.0, 21.0], second]


@pytest.mark.parametrize("order", ["v1", "v2"])
def test_assign_and_source_name_the_patches_of_a_token(order: str) -> None:
    out = _unshuffled(order, (6, 4))
    assert out.assign is not None
    for row in range(6):
        members = out.tokens[0, row].long().tolist()
        assert (out.assign[0] == row).nonzero().flatten().tolist() == members
        assert out.source[0, row].item() == members[-1]  # of four, the one below and right of the middle


@pytest.mark.parametrize("order", ["v1", "v2"])
def test_a_block_with_padding_is_padding(order: str) -> None:
    valid = torch.ones(1, 24, dtype=torch.bool)
    valid[0, 14] = False
    out = _unshuffled(order, (6, 4), valid)
    assert out.assign is not None
    assert (~out.valid[0]).nonzero().flatten().tolist() == [out.assign[0, 14].item()]


def test_adaptive_windows_are_those_of_pytorch() -> None:
    draw = torch.Generator().manual_seed(0)
    for arriving, leaving in ((27, 12), (14, 7), (7, 7), (5, 3), (10, 12)):
        line = torch.randn(1, 1, arriving, generator=draw)
        want = torch.nn.functional.adaptive_avg_pool1d(line, leaving)[0, 0]
        assert torch.allclose(line_matrix(arriving, leaving, "adaptive") @ line[0, 0], want, atol=1e-6), (arriving, leaving)
    # the negative twin: windows that don't overlap are others
    assert not torch.allclose(line_matrix(27, 12, "adaptive"), line_matrix(27, 12, "area"), atol=1e-3)


def _random(method: type[Method], config: MethodConfig, grid: tuple[int, int], valid: Tensor | None = None) -> Compressed:
    facts = replace(FACTS, encoder=replace(FACTS.encoder, grid=grid))
    draw = torch.Generator().manual_seed(1)
    n = grid[0] * grid[1]
    weights = {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in method.weights(config, facts).items()}
    seen = torch.ones(1, n, dtype=torch.bool) if valid is None else valid
    context = Context(_layout(grid), facts, seen, torch.arange(n).unsqueeze(0), weights=weights)
    tokens = torch.randn(1, n, 32, generator=draw)
    out = method.apply(STAGE, tokens, context, config)
    assert out.tokens.shape[1] == method.layout(STAGE, _layout(grid), config, facts).tokens
    return out


@pytest.mark.parametrize(
    ("method", "config", "near"),
    [(Ldp, Ldp.Config(), 4), (LdpV2, LdpV2.Config(grid=(7, 5)), 4), (CAbstractor, CAbstractor.Config(grid=(7, 5), hidden=16, depth=1), 4)],
    ids=["ldp", "ldp_v2", "c_abstractor"],
)
def test_a_raster_that_is_not_square(method: type[Method], config: MethodConfig, near: int) -> None:
    """14 x 10 to 7 x 5: every token's patches are the square of 2 x 2 it stands for, and its source is one of them."""
    out = _random(method, config, (14, 10))
    assert out.assign is not None
    for row in (0, 8, 34):
        members = (out.assign[0] == row).nonzero().flatten().tolist()
        corner = (row // 5) * 2 * 10 + (row % 5) * 2
        assert members == [corner, corner + 1, corner + 10, corner + 11] and len(members) == near
        assert out.source[0, row].item() in members


def test_only_the_windows_with_padding_are_padding() -> None:
    valid = torch.ones(1, 140, dtype=torch.bool)
    valid[0, 23] = False  # row 2, column 3: the square (1, 1), token 6 of 7 x 5
    for method, config in ((Ldp, Ldp.Config()), (LdpV2, LdpV2.Config(grid=(7, 5)))):
        assert (~_random(method, config, (14, 10), valid).valid[0]).nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("name", PROJECTORS)
def test_another_site_is_refused(name: str) -> None:
    method = METHODS.get(name)
    with pytest.raises(ValueError, match=r"does not act at projector; its sites are projector\.replace"):
        method.stages(Site.parse("projector"), method.Config(), FACTS)
    assert method.stages(AT, method.Config(), FACTS)


@pytest.mark.parametrize("name", PROJECTORS)
def test_tokens_without_a_raster_are_refused(name: str) -> None:
    method = METHODS.get(name)
    with pytest.raises(ValueError, match="needs a raster"):
        method.layout(STAGE, Layout((Segment("visual", 49),), 32), method.Config(), FACTS)


def test_place_vectors_need_the_encoders_raster() -> None:
    config = CAbstractor.Config(grid=(4, 4), hidden=16)
    with pytest.raises(ValueError, match=r"\[8, 8\] patches, and \[6, 6\] arrive"):
        CAbstractor.layout(STAGE, _layout((6, 6)), config, FACTS)
    assert CAbstractor.layout(STAGE, _layout((6, 6)), config.model_copy(update={"pos_emb": False}), FACTS).tokens == 16


def test_a_norm_per_patch_is_not_a_norm_per_block() -> None:
    """Scaling one patch of a block by a positive number leaves the merger's token as it is, up to eps."""
    facts = replace(FACTS, encoder=replace(FACTS.encoder, grid=(2, 2)))
    draw = torch.Generator().manual_seed(2)
    for norm in ("layer", "rms"):
        config = PatchMerger.Config(norm=norm)
        weights = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in PatchMerger.weights(config, facts).items()}
        tokens = torch.randn(1, 4, 32, generator=draw)
        context = Context(_layout((2, 2)), facts, torch.ones(1, 4, dtype=torch.bool), torch.arange(4).unsqueeze(0), weights=weights)
        plain, scaled, other = (
            PatchMerger.apply(STAGE, tokens * factor.reshape(1, 4, 1), context, config).tokens
            for factor in (torch.ones(4), torch.tensor([1.0, 3.0, 1.0, 1.0]), torch.tensor([1.0, -3.0, 1.0, 1.0]))
        )
        assert torch.allclose(plain, scaled, atol=1e-4)  # eps 1e-6 against a variance of 1
        assert not torch.allclose(plain, other, atol=1e-3)


def _with_weights_of(module: torch.nn.Module, names: dict[str, str], tokens: Tensor, method: type[Method], config: MethodConfig) -> Tensor:
    """Run a method on a raster `[h, w, c]` with a module's weights under our names."""
    draw = torch.Generator().manual_seed(3)
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=draw) * 0.3
    h, w, c = tokens.shape
    state = module.state_dict()
    weights = {names.get(name.rpartition(".")[0], name.rpartition(".")[0]) + "." + name.rpartition(".")[2]: state[name] for name in state}
    facts = replace(FACTS, encoder=replace(FACTS.encoder, width=c, grid=(h, w)), decoder=replace(FACTS.decoder, width=24))
    assert {name: tuple(value.shape) for name, value in weights.items()} == dict(method.weights(config, facts))
    context = Context(_layout((h, w), c), facts, torch.ones(1, h * w, dtype=torch.bool), torch.arange(h * w).unsqueeze(0), weights=weights)
    with torch.no_grad():
        return method.apply(STAGE, tokens.reshape(1, h * w, c), context, config).tokens[0]


def test_the_projection_is_that_of_internvl() -> None:
    """The goldens hold the joining; the layers after it, against transformers, which has other names for them."""
    from types import SimpleNamespace as Config

    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    sizes = Config(
        vision_config=Config(hidden_size=6), text_config=Config(hidden_size=24), downsample_ratio=0.5, projector_hidden_act="gelu"
    )
    module = InternVLMultiModalProjector(sizes)
    raster = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(4))
    names = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
    ours = _with_weights_of(module, names, raster, PixelUnshuffle, PixelUnshuffle.Config())
    with torch.no_grad():
        theirs = module(InternVLModel.pixel_shuffle(None, raster.unsqueeze(0)).flatten(1, 2))[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, theirs.flip(0), atol=1e-2)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_merger_is_that_of_qwen(norm: str) -> None:
    """The golden has the RMS norm; both, against transformers, on patches in the processor's order."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as Qwen2VLPatchMerger

    module = (Qwen2VLPatchMerger if norm == "layer" else Qwen2_5_VLPatchMerger)(dim=24, context_dim=6)
    raster = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(5))
    ours = _with_weights_of(module, {}, raster, PatchMerger, PatchMerger.Config.model_validate({"norm": norm}))
    with torch.no_grad():
        theirs = module(raster.reshape(2, 2, 3, 2, 6).transpose(1, 2).reshape(24, 6))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, theirs.flip(0), atol=1e-2)
