"""Reads the builder's log: the engine inspector needs a GPU driver, the log does not."""

from __future__ import annotations

import re

from tmc_export.engine.options import LayerInfo

__all__ = ["activation_bytes", "parse_layers"]

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,\n]+)(?P<rest>.*)", re.MULTILINE)
_CONSTANTS = re.compile(r"Constants: \[(.*?)\], Outputs:")
_TYPE = re.compile(r"Datatype: (\w+)")
_ACTIVATION = re.compile(r"^Total Activation Memory: (\d+) bytes", re.MULTILINE)


def parse_layers(message: str) -> tuple[LayerInfo, ...]:
    """Return the layers of a "Layers:" message (detailed profiling verbosity, verbose logger).

    >>> parse_layers("Layers:\\nName: _gemm_mha_v2_myl0_3, LayerType: kgen, Inputs: []")[0].attention
    True
    >>> line = "Name: fc, LayerType: runtime_fusion, Inputs: [], Constants: [ { Name: w, Datatype: Int8 }], Outputs: [ { Datatype: Half }]"
    >>> parse_layers(line)[0].constants
    ('Int8',)
    """
    return tuple(LayerInfo(found["name"], found["kind"].strip(), _constants(found["rest"])) for found in _LAYER.finditer(message))


def _constants(line: str) -> tuple[str, ...]:
    found = _CONSTANTS.search(line)
    return () if found is None else tuple(dict.fromkeys(_TYPE.findall(found[1])))


def activation_bytes(lines: list[str]) -> tuple[int, ...]:
    """Return the activation memory of each profile, in the order the builder printed it."""
    return tuple(int(found[1]) for line in lines for found in _ACTIVATION.finditer(line))
