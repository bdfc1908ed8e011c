"""The reference's own text towers: transformers' `CLIPTextModelWithProjection` with transformers' tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tmc_export.core.errors import ModelError
from tmc_export.graphs._contract import TextTower
from tmc_export.plan.towers import asked_towers
from tmc_export.plan.types import Plan, StagePlan, TowerPlan

__all__ = ["TextTowers"]


class TextTowers:
    """The text towers of a plan, each loaded once.

    Args:
        plan: names them, and the stages that ask.
        dtype: of what they return. They compute in float32: the model's own mask is the lowest number of a precision, to which half
            precision cannot add a product.

    Raises:
        ModelError: a tower cannot be loaded.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        stages: list[StagePlan] = [s for v in plan.vision for s in v.stages] + [s for c in plan.cuts for s in c.stages]
        self.needs: dict[TextTower, TowerPlan] = asked_towers(plan, stages)
        self.dtype = dtype
        self._loaded = {tower.index: self._load(tower) for tower in self.needs.values()}

    def of(self, text: str) -> dict[int, Tensor]:
        """Return what each tower makes of a question: its index → `[1, width]`."""
        return {tower.index: self._embed(tower, text).to(self.dtype) for tower in {t.index: t for t in self.needs.values()}.values()}

    def _embed(self, tower: TowerPlan, text: str) -> Tensor:
        model, tokenizer = self._loaded[tower.index]
        given = tokenizer(text, padding="max_length", truncation=True, max_length=tower.tokens, return_tensors="pt")
        embedding: Tensor = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).text_embeds
        return embedding

    def _load(self, tower: TowerPlan) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection
        from transformers.utils import logging as transformers_logging

        logging: Any = transformers_logging
        told, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # the visual side of a whole CLIP is left over, and that is no news
        logging.disable_progress_bar()
        if tower.path is None:
            raise ModelError(f"the plan does not say where the text tower '{tower.source}' lies; make it from the recipe again")
        try:
            config: Any = AutoConfig.from_pretrained(tower.path, local_files_only=True)
            text: Any = getattr(config, "text_config", config)
            text.projection_dim = config.projection_dim
            model: Any = CLIPTextModelWithProjection.from_pretrained(
                tower.path, config=text, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(tower.path, local_files_only=True)
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{tower.path}: the text tower cannot be loaded: {reason}; fetch it again") from error
        finally:
            logging.set_verbosity(told)
            if bar:
                logging.enable_progress_bar()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model.eval(), tokenizer
