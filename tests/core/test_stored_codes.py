"""What config.json says of linears that are stored as codes: what is read, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests._packed import FORMS
from tmc_export.core.errors import ModelError
from tmc_export.core.stored_codes import METHODS, read_stored_scheme

SAYS = {
    "gptq": "int4 (gptq, groups of 32)",
    "gptq-v2-zero-points": "int4 (gptq, groups of 64, zero points)",
    "gptq-channels": "int4 (gptq, a scale per output channel)",
    "gptq-act-order": "int4 (gptq, groups of 32, activation order)",
    "gptq-8-bits": "int8 (gptq, groups of 32)",
    "awq": "int4 (awq, groups of 32, zero points)",
    "awq-64": "int4 (awq, groups of 64, zero points)",
    "packed": "int4 (compressed-tensors, groups of 32)",
    "packed-zero-points": "int4 (compressed-tensors, groups of 32, zero points)",
    "packed-act-order": "int4 (compressed-tensors, groups of 32, activation order, zero points)",
    "packed-8-bits": "int8 (compressed-tensors, a scale per output channel)",
    "int8": "int8 (compressed-tensors, a scale per output channel)",
    "fp8": "fp8 (compressed-tensors, a scale per output channel)",
    "fp8-one-scale": "fp8 (compressed-tensors, a scale per output channel)",
}


def read(section: Any, **config: Any) -> Any:
    return read_stored_scheme({"quantization_config": section, **config})


def test_every_form_is_read() -> None:
    assert set(SAYS) == set(FORMS)
    for name, form in FORMS.items():
        found = read(dict(form.config))
        assert found.says == SAYS[name] and found.bits == form.bits and found.group == form.group
        assert found.symmetric == form.symmetric
        assert found.zero_bias == (1 if name in ("gptq", "gptq-channels", "gptq-8-bits", "gptq-act-order") else 0)
        assert found.scattered == form.scattered
        assert found.inputs == ("int8" if name == "int8" else "") and not found.kv


def test_nothing_is_quantized() -> None:
    assert read_stored_scheme({}) is None and read(None) is None


def test_the_section_may_stand_with_the_decoder() -> None:
    assert read_stored_scheme({"text_config": {"quantization_config": dict(FORMS["awq"].config)}}).method == "awq"


def gptq(**options: Any) -> dict[str, Any]:
    return {**FORMS["gptq"].config, **options}


def groups(first: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The `packed` form with some of its first group's keys changed."""
    config = FORMS["packed"].config
    given = config["config_groups"]["group_0"]
    return {**config, "config_groups": {"group_0": {**given, **first}}, **options}


def weights(**options: Any) -> dict[str, Any]:
    given = FORMS["packed"].config["config_groups"]["group_0"]["weights"]
    return groups({"weights": {**given, **options}})


REFUSED = {
    "no mapping": (["gptq"], "quantization_config must be a mapping"),
    "no method": ({"bits": 4}, "quant_method is None"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', which is not read"),
    "hqq": ({"quant_method": "hqq"}, f"read are {', '.join(METHODS)}; name such a checkpoint, or the unquantized model"),
    "auto-round": ({"quant_method": "auto-round"}, "save it with AutoRound's format auto_gptq"),
    "fp8 in tiles": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "tiles of rows and columns"),
    "3 bits": (gptq(bits=3), "bits is 3, which is not read; read are 4 and 8 bits"),
    "bits as text": (gptq(bits="4"), "bits is '4'"),
    "no group": (gptq(group_size=0), "group_size is 0"),
    "a flag as text": (gptq(sym="yes"), "sym is 'yes'"),
    "marlin": (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    "marlin by its flag": (gptq(is_marlin_format=True), "checkpoint_format is 'gptq'"),
    "a quantized head": (gptq(lm_head=True), "lm_head is True"),
    "other bits in places": (gptq(dynamic={r"+:.*down.*": {"bits": 8}}), "dynamic is .* all stored alike"),
    "int16 words": (gptq(pack_dtype="int16"), "pack_dtype is 'int16'"),
    "gemv": ({**FORMS["awq"].config, "version": "gemv"}, "version is 'gemv', which is not read; read is gemm"),
    "awq of 8 bits": ({**FORMS["awq"].config, "bits": 8}, "bits is 8"),
    "awq's list": ({**FORMS["awq"].config, "modules_to_not_convert": [3]}, "it is a list of names"),
    "no groups": ({**FORMS["packed"].config, "config_groups": {}}, "config_groups is"),
    "a preset": ({**FORMS["packed"].config, "config_groups": {"W4A16": ["Linear"]}}, "config_groups is"),
    "only inputs": (groups({"weights": None}), "none of them has weights"),
    "a dense format": ({**FORMS["packed"].config, "format": "dense"}, "format is 'dense', which is not read; read are pack-quantized"),
    "nvfp4": ({**FORMS["packed"].config, "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
    "3 packed bits": (weights(num_bits=3), "pack-quantized of int3"),
    "packed floats": (weights(type="float", num_bits=8), "pack-quantized of fp8"),
    "tiles": (weights(strategy="block", group_size=None, block_structure=[128, 128]), "strategy block of int4"),
    "sparse": ({**FORMS["packed"].config, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
    "rotations": ({**FORMS["packed"].config, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config is"),
    "a broken pattern": ({**FORMS["packed"].config, "ignore": ["re:("]}, "no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(case: str) -> None:
    section, says = REFUSED[case]
    with pytest.raises(ModelError, match=says) as caught:
        read(section)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_looks_alike_is_read() -> None:
    """Twins of the refusals: the same keys with values that mean nothing else."""
    assert not read(gptq(desc_act=True, group_size=-1)).scattered  # one group cannot be
    assert not read(gptq(desc_act=True, static_groups=True)).scattered
    assert read(gptq(desc_act=True)).scattered and read(weights(actorder="group")).scattered and read(weights(actorder="dynamic")).scattered
    assert read(gptq(dynamic={"-:.*down_proj": {}})).ignore == ("re:.*down_proj",)
    assert not read(weights(actorder="weight")).scattered and not read(weights(actorder="static")).scattered
    assert read({**FORMS["packed"].config, "sparsity_config": {"format": "dense"}, "transform_config": {}}).says == SAYS["packed"]
    assert read({**FORMS["packed"].config, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}).kv == "fp8"


def test_groups_that_are_stored_alike_are_one() -> None:
    one = FORMS["packed"].config["config_groups"]["group_0"]
    two = {"a": {**one, "targets": ["re:.*mlp.*"]}, "b": {**one, "targets": ["re:.*self_attn.*"]}}
    found = read({**FORMS["packed"].config, "config_groups": two})
    assert found.covers(["model.layers.0.mlp.up_proj"]) and found.covers(["model.layers.0.self_attn.q_proj"])
    assert not found.covers(["model.layers.0.other"])
    two["b"] = {**two["b"], "weights": {**one["weights"], "group_size": 64}}
    with pytest.raises(ModelError, match="groups of 32.*groups of 64.*all stored alike"):
        read({**FORMS["packed"].config, "config_groups": two})


def test_which_linears_are_meant() -> None:
    names = [[f"{p}layers.{i}.mlp.{x}_proj" for p in ("model.", "language_model.model.")] for i in (0, 1, 11) for x in ("up", "down")]
    awq = read({**FORMS["awq"].config, "modules_to_not_convert": ["layers.1.mlp.up_proj", "visual"]})
    assert [awq.covers(n) for n in names] == [True, True, False, True, True, True]
    listed = read(gptq(modules_in_block_to_quantize=[["mlp.up_proj"], ["self_attn.q_proj"]]))
    assert [listed.covers(n) for n in names] == [True, False] * 3
    exact = read({**FORMS["packed"].config, "ignore": ["model.layers.1.mlp.up_proj", "layers.0.mlp.up_proj", "re:.*layers.11.*"]})
    assert [exact.covers(n) for n in names] == [True, True, False, True, False, False]  # a whole name is not a part of one
