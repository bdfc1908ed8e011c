"""What fitting sees of the model: attention sums as Hugging Face's own, deletions that later layers feel, and the divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.verify._prompts import Planner, Prompter
from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Attention, Keys, Need, Site, Stage
from tmc_export.plan.source import read_model_files
from tmc_export.verify.reference import Reference
from tmc_export.verify.statistics import Calibration, Question

OWN = Attention(rows="visual", heads="max", row_sum=True)
CROSS = Attention(rows="text", heads="max", row_sum=True)
STAGES = tuple(Stage(Site("decoder", layer), (OWN, CROSS), layer - 1) for layer in (1, 2, 3))
ASKED = (("scene-1.png", "what is at c4"), ("scene-2.png", "what colour is d3"))


@pytest.fixture(scope="module")
def calibration(model: Path, planned: Planner) -> Calibration:
    questions = [Question(model.parent / "pictures" / picture, text) for picture, text in ASKED]
    return Calibration(model, planned(), read_model_files(model), None, questions)


def seen(calibration: Calibration) -> dict[tuple[int, int], Mapping[Need, Tensor]]:
    found: dict[tuple[int, int], Mapping[Need, Tensor]] = {}

    def visit(prompt: int, stage: Stage, captured: Mapping[Need, Tensor]) -> None:
        found[prompt, stage.index] = {need: value.clone() for need, value in captured.items()}

    calibration.look(STAGES, visit)
    return found


def test_sums_are_those_of_the_models_own_maps(calibration: Calibration, prompt: Prompter, model: Path, planned: Planner) -> None:
    found = seen(calibration)
    assert set(found) == {(prompt, layer) for prompt in (0, 1) for layer in (0, 1, 2)}
    whole = Reference(model, planned()).model.whole
    for number, (picture, question) in enumerate(ASKED):
        given = prompt(question, [picture])
        with torch.no_grad():
            maps = whole(
                input_ids=torch.from_numpy(given.input_ids)[None],
                pixel_values=torch.from_numpy(given.pixels[0])[None],
                output_attentions=True,
            ).attentions
        visual = torch.from_numpy(given.group) > 0
        for layer in range(3):
            largest = maps[layer][0].amax(0)
            own, cross = largest[visual][:, visual].sum(0), largest[~visual][:, visual].sum(0)
            captured = found[number, layer]
            # float32, other order of the layers' sums: 196 rows of values up to 1
            torch.testing.assert_close(captured[OWN], own, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(captured[CROSS], cross, rtol=1e-4, atol=1e-5)
            mean = maps[layer][0].mean(0)[visual][:, visual].sum(0)
            assert not torch.allclose(captured[OWN], mean, rtol=1e-2)  # the twin: other heads would be found


def test_what_is_dropped_is_not_seen_by_later_layers(calibration: Calibration) -> None:
    whole = seen(calibration)
    found: dict[tuple[int, int], Tensor] = {}

    def visit(prompt: int, stage: Stage, captured: Mapping[Need, Tensor]) -> Tensor | None:
        found[prompt, stage.index] = captured[OWN].clone()
        return torch.arange(0, 196, 2) if stage.index == 0 else None

    calibration.look(STAGES, visit)
    for prompt in (0, 1):
        torch.testing.assert_close(found[prompt, 0], whole[prompt, 0][OWN], rtol=0, atol=0)
        assert found[prompt, 1].shape == found[prompt, 2].shape == (98,)
        assert not torch.allclose(found[prompt, 1], whole[prompt, 1][OWN][::2], rtol=1e-2)  # and what is left looks elsewhere
    torch.testing.assert_close(seen(calibration)[1, 2][OWN], whole[1, 2][OWN], rtol=0, atol=0)  # nothing stays of it


@pytest.mark.parametrize("kept", [[], [3, 1], [0, 0], [196], [-1, 0]])
def test_a_visitor_that_names_no_tokens(calibration: Calibration, kept: list[int]) -> None:
    with pytest.raises(ExportError, match="ascending indices, at least 1"):
        calibration.look(STAGES[:1], lambda prompt, stage, captured: torch.tensor(kept, dtype=torch.int64))


@pytest.mark.parametrize(
    "stage",
    [
        Stage(Site("decoder", 0), (OWN,)),
        Stage(Site("projector"), ()),
        Stage(Site("decoder", 1), (Keys(),)),
        Stage(Site("decoder", 1), (Attention(layer="next"),)),
    ],
)
def test_what_cannot_be_looked_at_is_refused(calibration: Calibration, stage: Stage) -> None:
    with pytest.raises(ExportError, match="fitting cannot look at"):
        calibration.look((stage,), lambda prompt, stage, captured: None)


def test_the_divergence_is_of_the_first_answer_token(calibration: Calibration, prompt: Prompter, model: Path, planned: Planner) -> None:
    plan = planned("- {at: decoder.1, method: vtw}")
    assert calibration.divergence(calibration.plan) == 0.0
    wanted = 0.0
    for picture, question in ASKED:
        given = prompt(question, [picture])
        rows = []
        for each in (plan, planned()):
            turn = Reference(model, each).turn(given.pixels, given.input_ids, given.group, max_new_tokens=1)
            rows.append(torch.softmax(torch.from_numpy(turn.logits[0]).double(), 0))
        wanted += float((rows[0] * (rows[0] / rows[1]).log()).sum()) / 2
    assert wanted > 1e-4
    assert calibration.divergence(plan) == pytest.approx(wanted, rel=1e-6)
    assert calibration.divergence(calibration.plan) == 0.0  # the model is as it was
