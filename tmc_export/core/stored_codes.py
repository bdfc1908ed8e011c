"""How a checkpoint says that its linears are stored as codes: the `quantization_config` of its config.json. No tensor is looked at here.

Read were, to know what the keys mean: GPTQ's of AutoGPTQ (`nn_modules/qlinear/qlinear_cuda.py`) and of GPTQModel (`utils/model.py`), AWQ's
of AutoAWQ (`modules/linear/gemm.py`), and compressed-tensors' (`quantization/quant_args.py`, `quant_config.py`, `utils/match.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tmc_export.core.errors import ModelError

__all__ = ["METHODS", "StoredScheme", "read_stored_scheme"]

Layout = Literal["gptq", "awq", "packed", "plain"]
Code = Literal["int4", "int8", "fp8"]
Section = Mapping[str, object]


@dataclass(frozen=True)
class StoredScheme:
    """How a checkpoint stores the linears that it quantizes; all of them alike.

    Attributes:
        method: as config.json names it: `gptq`, `awq` or `compressed-tensors`.
        layout: how codes lie in the file: GPTQ's or AWQ's words, compressed-tensors' words (`packed`), or one code an element (`plain`).
        weights: what a code is: `int4`, `int8` or `fp8`.
        group: input channels that share a scale; 0: all of them, a scale per output channel.
        symmetric: no zero point but the middle of the codes.
        scattered: a group may be any input channels, not only some in a row (activation order).
        zero_bias: what zero points are stored less: 1 in GPTQ's first format.
        targets, ignore: which linears: names, or `re:` and a pattern that matches from a name's beginning; `Linear` is every linear.
        words: a name need only be whole words of the linear's own, in a row.
        inputs: what the maker's runtime rounds the inputs of products to; empty: nothing.
        kv: what it rounds keys and values to; empty: nothing.
    """

    method: str
    layout: Layout
    weights: Code
    group: int
    symmetric: bool = True
    scattered: bool = False
    zero_bias: int = 0
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    words: bool = True
    inputs: str = ""
    kv: str = ""

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.weights == "int4" else 8

    @property
    def says(self) -> str:
        """In a few words: `int4 (gptq, groups of 128, zero points)`."""
        scales = f"groups of {self.group}" if self.group else "a scale per output channel"
        order = ", activation order" if self.scattered else ""
        return f"{self.weights} ({self.method}, {scales}{order}{'' if self.symmetric else ', zero points'})"

    def covers(self, names: Sequence[str]) -> bool:
        """Whether a linear is stored as codes.

        Args:
            names: every name that the linear goes by; old and new layouts have other prefixes.

        >>> scheme = StoredScheme("awq", "awq", "int4", 128, ignore=("visual", "layers.0.mlp"))
        >>> [scheme.covers([f"model.layers.{i}.mlp.up_proj"]) for i in (0, 1, 10)]
        [False, True, True]
        """
        if any(self._matches(pattern, name) for pattern in self.ignore for name in names):
            return False
        return any(self._matches(pattern, name) for pattern in self.targets for name in names)

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern.startswith("re:"):
            return re.match(pattern.removeprefix("re:"), name) is not None
        return pattern in ("Linear", name) or (self.words and f".{pattern.strip('.')}." in f".{name}.")


def read_stored_scheme(config: Mapping[str, object]) -> StoredScheme | None:
    """Read a config.json.

    Args:
        config: parsed.

    Returns:
        How its linears are stored; None where nothing is quantized.

    Raises:
        ModelError: a method, format or option that is not read; says which are, and the fix.

    >>> read_stored_scheme({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}).says
    'int4 (gptq, groups of 64)'
    """
    section = _section(config)
    if section is None:
        return None
    method = str(section.get("quant_method", "")).lower().replace("_", "-")
    if method not in METHODS:
        hint = _HINTS.get(method, "")
        raise _refused("quant_method", section.get("quant_method"), f"read are {', '.join(METHODS)}{hint}")
    return METHODS[method](section)


def _section(config: Mapping[str, object]) -> Section | None:
    """The mapping, wherever makers put it."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, Mapping):
                return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else found
            if found is not None:
                raise ModelError(f"config.json: {key} must be a mapping, got {found!r}; fetch the model again")
    return None


_HINTS = {
    "auto-round": "; save it with AutoRound's format auto_gptq or llm_compressor",
    "fp8": ", none of which has scales for tiles of rows and columns",
    "bitsandbytes": "; its codes are places in a table (nf4) or are made while it loads",
}
"""Method that is not read → what to know of it."""


def _refused(key: str, value: object, read: str) -> ModelError:
    shown = repr(value)
    shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
    return ModelError(
        f"config.json: quantization_config.{key} is {shown}, which is not read; {read}; name such a checkpoint, or the unquantized model "
        "with quantize: {decoder: {weights: int4, block: 128}}"
    )


def _whole(section: Section, key: str, default: int, allowed: Callable[[int], bool], read: str) -> int:
    value = section.get(key, default)
    if type(value) is not int or not allowed(value):
        raise _refused(key, value, read)
    return value


def _flag(section: Section, key: str, default: bool) -> bool:
    value = section.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _refused(key, value, "it is true or false")
    return value


def _names(section: Section, key: str) -> tuple[str, ...]:
    """A list of names, or of lists of names; None is empty. Patterns must be regular expressions."""
    value = section.get(key)
    found: list[object] = []
    for item in value if isinstance(value, (list, tuple)) else () if value is None else (None,):
        found += item if isinstance(item, (list, tuple)) else [item]
    names = tuple(name for name in found if isinstance(name, str))
    if len(names) != len(found):
        raise _refused(key, value, "it is a list of names")
    return _checked(key, names)


def _checked(key: str, names: Iterable[str]) -> tuple[str, ...]:
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name.removeprefix("re:"))
            except re.error as error:
                raise _refused(key, name, f"it is no regular expression ({error})") from error
    return tuple(names)


def _group(section: Section) -> int:
    """`group_size`; 0 where a scale is of an output channel (-1)."""
    size = _whole(section, "group_size", 128, lambda n: n == -1 or n > 0, "it is -1, or a number of input channels")
    return 0 if size == -1 else size


def _gptq(section: Section) -> StoredScheme:
    bits = _whole(section, "bits", 4, lambda n: n in (4, 8), "read are 4 and 8 bits")
    form = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2") or _flag(section, "is_marlin_format", False):
        raise _refused("checkpoint_format", form, "read are gptq and gptq_v2")
    if section.get("pack_dtype") not in (None, "int32"):
        raise _refused("pack_dtype", section.get("pack_dtype"), "read is int32")
    group = _group(section)
    scattered = bool(group) and _flag(section, "desc_act", False) and not _flag(section, "static_groups", False)
    if _flag(section, "lm_head", False):
        raise _refused("lm_head", True, "read are linears of the decoder's layers, and the head as it is")
    dynamic = section.get("dynamic") or {}
    keys = [str(key) for key in dynamic] if isinstance(dynamic, Mapping) else [""]
    if not all(key.startswith("-:") for key in keys):
        raise _refused("dynamic", dynamic, "read are linears that are all stored alike")
    return StoredScheme(
        "gptq", "gptq", "int4" if bits == 4 else "int8", group, _flag(section, "sym", True), scattered, 1 if form == "gptq" else 0,
        targets=_names(section, "modules_in_block_to_quantize") or ("Linear",),
        ignore=_names(section, "modules_to_not_convert") + _checked("dynamic", [f"re:{key[2:]}" for key in keys]),
    )  # fmt: skip


def _awq(section: Section) -> StoredScheme:
    section = {**section, "bits": section.get("bits", section.get("w_bit", 4))}
    section["group_size"] = section.get("group_size", section.get("q_group_size", 128))
    _whole(section, "bits", 4, lambda n: n == 4, "read are 4 bits")
    form = str(section.get("version") or section.get("format") or "gemm").lower()
    if form != "gemm":
        raise _refused("version", form, "read is gemm")
    return StoredScheme(
        "awq", "awq", "int4", _group(section), not _flag(section, "zero_point", True), ignore=_names(section, "modules_to_not_convert")
    )


_FORMATS: Mapping[str, tuple[Layout, str]] = {
    "pack-quantized": ("packed", "int"), "int-quantized": ("plain", "int"), "float-quantized": ("plain", "float"),
    "naive-quantized": ("plain", ""),
}  # fmt: skip
"""compressed-tensors' formats that are read: how codes lie, and of which type they are."""
_CODES: Mapping[str, Code] = {"int4": "int4", "int8": "int8", "fp8": "fp8"}
"""What a code may be."""


def _compressed(section: Section) -> StoredScheme:
    for key, plain in (("sparsity_config", "dense"), ("transform_config", None)):
        value = section.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == plain and plain is not None):
            raise _refused(key, value, "read are whole matrices that are multiplied as they are")
    groups = section.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    if not found or not isinstance(groups, Mapping) or len(found) != len(groups):
        raise _refused("config_groups", groups, "it is a mapping of groups with targets and weights")
    weighing = [g for g in found if isinstance(g.get("weights"), Mapping)]
    ignore, kv = _names(section, "ignore"), section.get("kv_cache_scheme")
    schemes = [_compressed_group(section, g, ignore, _code(kv)) for g in weighing]
    if not schemes:
        raise _refused("config_groups", list(groups), "none of them has weights")
    first = schemes[0]
    if any(_alike(first) != _alike(other) for other in schemes):
        raise _refused("config_groups", ", ".join(s.says for s in schemes), "read are linears that are all stored alike")
    return replace(first, targets=tuple(t for s in schemes for t in s.targets))


def _alike(scheme: StoredScheme) -> tuple[object, ...]:
    return scheme.layout, scheme.weights, scheme.group, scheme.symmetric, scheme.scattered, scheme.inputs


def _compressed_group(section: Section, group: Section, ignore: tuple[str, ...], kv: str) -> StoredScheme:
    form = str(group.get("format") or section.get("format") or "")
    if form not in _FORMATS:
        raise _refused("format", form, f"read are {', '.join(_FORMATS)}")
    layout, kind = _FORMATS[form]
    given = group.get("weights")
    weights: Section = given if isinstance(given, Mapping) else {}
    code = _CODES.get(_code(weights))
    if code is None or (kind and code.startswith("int") != (kind == "int")) or (layout, code) == ("plain", "int4"):
        raise _refused("config_groups", f"{form} of {_code(weights)}", "read are packed int4 and int8, and plain int8 and fp8")
    size = weights.get("group_size")
    strategy = str(weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")).lower()
    if strategy not in ("tensor", "channel", "group") or (strategy == "group" and code == "fp8"):
        raise _refused("config_groups", f"strategy {strategy} of {code}", "read are channel and tensor, and group for int4 and int8")
    return StoredScheme(
        "compressed-tensors", layout, code, _group(weights) if strategy == "group" else 0, _flag(weights, "symmetric", True),
        strategy == "group" and weights.get("actorder") in (True, "group", "dynamic"),
        targets=_names(group, "targets") or ("Linear",), ignore=ignore, words=False, inputs=_code(group.get("input_activations")), kv=kv,
    )  # fmt: skip


def _code(arguments: object) -> str:
    """`int8`, `fp8` and the like of compressed-tensors' arguments; empty for none."""
    if not isinstance(arguments, Mapping):
        return ""
    return f"{'fp' if str(arguments.get('type', 'int')).lower() == 'float' else 'int'}{arguments.get('num_bits', 8)}"


METHODS: Mapping[str, Callable[[Section], StoredScheme]] = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
"""Methods that are read."""
