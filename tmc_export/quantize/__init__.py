"""Weight schemes: one file each, registered under the name that a recipe writes. A new scheme is a file here and its import in `_load`;
its name, parts and blocks stand in `recipe/_schemes.py`, its capability in `plan/quantization.py`, and `docs/quantization.md` has its row.

What is quantized is the weights that a matrix product reads, and nothing else: the arithmetic of score, top-k and gather never is, so
that a selection does not turn on a rounded score. Compress graphs are left as they are, whatever the recipe says.
"""

from __future__ import annotations

from tmc_export.quantize._contract import SCHEMES, Applied, Scheme, WeightPlan

__all__ = ["SCHEMES", "Applied", "Scheme", "WeightPlan"]
