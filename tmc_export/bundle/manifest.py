"""The manifest of a bundle: what it was made from and with, and the hash of every file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tmc_export.bundle.program import Program

__all__ = ["MANIFEST", "SCHEMA", "FileEntry", "Manifest"]

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of the manifest; a reader refuses a newer one."""


class FileEntry(BaseModel):
    """A file of the bundle: size in bytes and sha256 in hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`.

    Attributes:
        bundle: schema version.
        name: the recipe's name.
        key: hash of everything that went in (recipe, plan, checkpoint, versions); an equal key is a cache hit.
        recipe, plan: as JSON.
        checkpoint: file → sha256 of the model's files that went in.
        weights: file of learned method weights, as the recipe writes it → its sha256.
        towers: text tower, as the recipe writes it → file → sha256.
        calibration: what schemes were found on: how many samples, and the sha256 of their texts and pictures; None without.
        versions: tool → version.
        program: what the runtime follows.
        proofs: rung → "passed", "failed" or "not run: …".
        files: path in the bundle → size and hash. The manifest itself is not listed, nor what `tmc-export engine` writes anew for another
            machine: `engines/engines.json` has size and hash of every engine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: int = SCHEMA
    name: str
    key: str
    recipe: dict[str, JsonValue]
    plan: dict[str, JsonValue]
    checkpoint: dict[str, str]
    weights: dict[str, str] = Field(default_factory=dict)
    towers: dict[str, dict[str, str]] = Field(default_factory=dict)
    calibration: dict[str, int | str] | None = None
    versions: dict[str, str]
    program: Program
    proofs: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @property
    def schemes(self) -> frozenset[str]:
        """The weight schemes of the recorded plan; slots hold no weights, and `Program.kv` has what they hold."""
        return frozenset(str(part["weights"]) for part in self._parts())

    @property
    def rounding(self) -> frozenset[tuple[str, str | None]]:
        """Weight and activation schemes (None: weight-only) that the build rounded to; the others are codes that the checkpoint brought."""
        parts = [part for part in self._parts() if not part.get("stored")]
        return frozenset((str(p["weights"]), None if p.get("activations") is None else str(p["activations"])) for p in parts)

    def _parts(self) -> list[dict[str, JsonValue]]:
        quantize = self.plan.get("quantize")
        parts = [part for name, part in quantize.items() if name != "kv"] if isinstance(quantize, dict) else []
        return [part for part in parts if isinstance(part, dict) and "weights" in part]
