"""Every shipped device loads, names its sources, and contradicts itself nowhere; wrong device files are refused like recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.core.errors import RecipeError
from tmc_export.recipe import Device, device_schema, devices, load_device

FOLDER = Path(__file__).resolve().parents[2] / "devices"
NAMES = [
    "cpu",
    "jetson-agx-orin-64gb",
    "jetson-agx-thor",
    "jetson-orin-nano-8gb",
    "jetson-orin-nx-16gb",
    "rtx-4090",
    "rtx-5090",
    "rtx-a2000-laptop",
]
ALL = devices()


def test_the_sweep_sees_every_file() -> None:
    assert sorted(file.stem for file in FOLDER.rglob("*.yaml")) == NAMES
    assert [device.name for device in ALL] == NAMES


@pytest.mark.parametrize("device", ALL, ids=lambda device: device.name)
def test_every_figure_has_a_source_or_is_unverified(device: Device) -> None:
    figures = device.figures()
    assert {"memory_gib", "memory_bandwidth_gb_s"} < set(figures)
    for name, figure in figures.items():
        assert figure.unverified if figure.value is None else figure.source, name
        if figure.source and not figure.unverified:
            assert "NVIDIA" in figure.source, f"{name}: a verified figure names the maker's document"


@pytest.mark.parametrize("device", ALL, ids=lambda device: device.name)
def test_a_device_agrees_with_itself(device: Device) -> None:
    assert (device.compute_capability is None) == (device.kind == "cpu") == (device.sm is None)
    assert device.tensorrt.flavour == {"jetson": "tensorrt", "rtx": "tensorrt-rtx", "cpu": "none"}[device.kind]
    if device.kind == "jetson":
        assert device.memory_shared
        assert device.tensorrt.releases[device.tensorrt.jetpack or ""] == device.tensorrt.version
    for precision in ("int8", "fp8", "fp4") if device.kind != "cpu" else ():  # no rate of a CPU is known
        assert (device.rate(precision) is not None) == (precision in device.precisions), precision
    rates = [figure.value for name in ("fp16", "fp8", "fp4") if (figure := device.rate(name)) is not None and figure.value is not None]
    assert rates == sorted(rates)


def test_what_the_legality_rules_stand_on() -> None:
    by_name = {device.name: device for device in ALL}
    orin, thor, cpu = by_name["jetson-agx-orin-64gb"], by_name["jetson-agx-thor"], by_name["cpu"]
    assert orin.sm == "SM87" and orin.tensorrt.version == "10.3" and orin.tensorrt.opset == 20
    assert "fp8" not in orin.precisions and {"fp8", "fp4"} <= set(thor.precisions)
    assert thor.compute_capability == "11.0"
    assert cpu.tensorrt.opset >= 21 and cpu.precisions == ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
    assert by_name["rtx-a2000-laptop"].sm == "SM86" and "fp8" not in by_name["rtx-a2000-laptop"].precisions
    assert by_name["rtx-4090"].sm == "SM89" and "fp4" not in by_name["rtx-4090"].precisions
    assert by_name["rtx-5090"].sm == "SM120"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: rtx", "kind: rxt", r":6:7: kind must be 'jetson', 'rtx' or 'cpu', got 'rxt'; did you mean 'rtx'"),
        (
            "memory_shared: false",
            "memory_shraed: false",
            r":9:1: unknown key 'memory_shraed' at the top level; did you mean 'memory_shared'",
        ),
        ('compute_capability: "8.9"', "compute_capability: 8.9", r":7:21: compute_capability must be text, got 8\.9"),
        ("value: 24, source", "value: 24, sourc", r":8:25: unknown key 'sourc' in memory_gib; did you mean 'source'"),
        ("value: 24,", "value: twenty,", r":8:21: memory_gib\.value must be a number, got 'twenty'"),
        ("value: 165.2,", "value: -1,", r":12:17: tflops\.fp16\.value must be more than 0, got -1"),
        ("  fp16:", "  fp15:", r":12:3: unknown key 'fp15' in tflops; did you mean 'fp16'"),
        ("device: 1", "device: 2", r":3:9: device schema 2 is newer than this tmc-export reads"),
        ("flavour: tensorrt-rtx", "flavour: none", r"tensorrt: a version goes with flavour"),
        ("fp8]", "fp88]", r"precisions\.5 must be .*did you mean 'fp8'"),
    ],
)
def test_wrong_devices(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = (FOLDER / "rtx-4090.yaml").read_text(encoding="utf-8")
    assert text.count(old) >= 1
    file = tmp_path / "wrong.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_device(file)


def test_an_unsourced_figure_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "cpu.yaml").read_text(encoding="utf-8")
    file = tmp_path / "wrong.yaml"
    file.write_text(text.replace("memory_gib: {value: null, unverified: true}", "memory_gib: {value: 8}"), encoding="utf-8")
    with pytest.raises(RecipeError, match="memory_gib: a figure needs a source"):
        load_device(file)
    file.write_text(text.replace("memory_gib: {value: null, unverified: true}", "memory_gib: {value: null}"), encoding="utf-8")
    with pytest.raises(RecipeError, match="memory_gib: a figure without a value must say unverified"):
        load_device(file)


def test_the_schema() -> None:
    schema = device_schema()
    assert schema["additionalProperties"] is False
    assert {"name", "compute_capability", "memory_gib", "tflops", "tensorrt", "precisions", "sources"} <= set(schema["properties"])
