"""A method in a folder of its own is registered, tried by the conformance suite, planned, built and verified, with no other edit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests._tiny import RECIPE, save_tiny_model

METHOD = '''
"""Every other token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, selected
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Stage

if TYPE_CHECKING:
    from torch import Tensor


@register("evens")
class Evens(Method):
    """Every other token stays. Paper: none."""

    paper = "none"
    official = "none"
    mechanism = "control"
    sites = ("projector", "decoder.<k>")

    class Config(MethodConfig):
        """`keep`: how many."""

        keep: Budget = Budget(tokens=4)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Evens.Config, facts: ModelFacts) -> Layout:
        return selected(layout, kept_of(config.keep, layout.tokens, stage.at))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Evens.Config) -> Compressed:
        import torch

        k = kept_of(config.keep, tokens.shape[1], stage.at)
        source = (torch.arange(k) * 2).expand(tokens.shape[0], k)
        return Compressed(tokens[:, 0 : 2 * k : 2], source, context.valid[:, 0 : 2 * k : 2])
'''

SCRIPT = """
import sys
from pathlib import Path

import tmc_export.graphs

tmc_export.graphs.__path__.append(sys.argv[1])
from tests._tiny import tmc
from tests.graphs import _checks

examples = [e for e in _checks.examples() if e.method.name == "evens"]
assert len(examples) == 1, "the conformance suite did not take the file up"
assert _checks.wrong_layout(examples[0]) == [] and _checks.wrong_onnx(examples[0]) == [] and _checks.not_refused(examples[0]) == []
listed = tmc("methods")
assert listed.code == 0 and "evens" in listed.out, listed.err
for verb in (["plan"], ["build", "-o", sys.argv[3]]):
    ran = tmc(verb[0], sys.argv[2], *verb[1:])
    assert ran.code == 0, ran.err
ran = tmc("verify", sys.argv[3])
assert ran.code == 0, ran.err
print("built and verified")
"""


def test_a_method_is_one_file(tmp_path: Path, repository: Path) -> None:
    methods = tmp_path / "methods"
    methods.mkdir()
    (methods / "evens.py").write_text(METHOD, "utf-8")
    save_tiny_model(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("method: fastv", "method: evens"), "utf-8")
    command = [sys.executable, "-c", SCRIPT, str(methods), str(recipe), str(tmp_path / "bundle")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "built and verified" in done.stdout, done.stdout + done.stderr
