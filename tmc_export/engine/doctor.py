"""Looks at this machine, and at a bundle's engines: what is here, what is missing, what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tmc_export.core.cache import CACHE
from tmc_export.core.errors import MissingExtraError, TmcError
from tmc_export.engine._device import CudaDevice, cuda_device
from tmc_export.engine._memory import available_bytes, gib
from tmc_export.engine.build import Builder, probe
from tmc_export.engine.bundle import EngineRecord, read_engines, same_release
from tmc_export.engine.cache import engine_cache

__all__ = ["EXTRAS", "Finding", "examine_engines", "examine_machine", "jetpack"]

EXTRAS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("export", ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum"), "builds bundles from checkpoints"),
    ("rtx", ("tensorrt_rtx", "cuda"), "builds and runs TensorRT-RTX engines for desktop GPUs"),
    ("jetson", ("cuda",), "runs TensorRT engines (JetPack brings `tensorrt` itself)"),
    ("audio", ("soundfile",), "reads sound"),
    ("video", ("av",), "reads video"),
    ("report", ("matplotlib",), "draws reports"),
)

_L4T = {"36.4": "6.1 or 6.2", "36.5": "6.2", "38.2": "7.0", "38.4": "7.1"}
"""L4T release -> JetPack, from NVIDIA's release notes; only the releases this project names."""


@dataclass(frozen=True)
class Finding:
    """One thing the doctor looked at.

    Attributes:
        name: `"TensorRT-RTX"`.
        value: what was found, `"1.7.1.116"`, or why nothing was.
        state: `"ok"`, `"absent"` (optional, not here) or `"problem"`.
        advice: what to do; empty when there is nothing to do.
    """

    name: str
    value: str
    state: str
    advice: str = ""


def jetpack(text: str) -> str | None:
    """Read /etc/nv_tegra_release: `"L4T 36.4.0, JetPack 6.1 or 6.2"`; `None` when it is of another form.

    >>> jetpack("# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic")
    'L4T 36.4.0, JetPack 6.1 or 6.2'
    """
    found = re.search(r"# R(\d+) .*?REVISION: (\d+)\.(\d+)", text)
    if not found:
        return None
    major, minor, patch = found.groups()
    name = _L4T.get(f"{major}.{minor}")
    return f"L4T {major}.{minor}.{patch}" + (f", JetPack {name}" if name else ", a JetPack this version does not know")


def _jetpack(root: Path) -> Finding:
    try:
        text = (root / "etc/nv_tegra_release").read_text()
    except OSError:
        return Finding("JetPack", "no Jetson", "absent")
    known = jetpack(text)
    return Finding("JetPack", known or text.splitlines()[0], "ok" if known else "problem")


def _builder(flavour: str, title: str) -> tuple[Finding, Builder | None]:
    module = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[flavour]
    if importlib.util.find_spec(module) is None:
        advice = "pip install 'tmc-export[rtx]'" if flavour == "tensorrt-rtx" else ""
        return Finding(title, "not installed", "absent", advice), None
    try:
        builder = probe(flavour)
    except MissingExtraError as error:
        return Finding(title, str(error), "problem", "install it again"), None
    except TmcError as error:
        return Finding(title, str(error), "problem", "the installed package does not start; install it again"), None
    return Finding(title, builder.version, "ok"), builder


def _gpu(device: CudaDevice | None) -> list[Finding]:
    if device is None:
        return [Finding("GPU", "no CUDA driver or no GPU", "absent"), Finding("CUDA driver", "not found", "absent")]
    value = f"{device.name}, {device.capability}, {device.memory_mib} MiB"
    return [Finding("GPU", value, "ok"), Finding("CUDA driver", f"CUDA {device.driver_cuda}", "ok")]


def _memory(root: Path) -> Finding:
    free = available_bytes(root / "proc/meminfo", root / "sys/fs/cgroup")
    if free is None:
        return Finding("free memory", "the system does not say", "absent")
    low = free < 2 * 2**30
    return Finding("free memory", gib(free), "problem" if low else "ok", "close other programs before building engines" if low else "")


def _power() -> Finding:
    tool = shutil.which("nvpmodel")
    if tool is None:
        return Finding("power mode", "no nvpmodel (no Jetson)", "absent")
    try:
        done = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("power mode", f"nvpmodel -q failed: {error}", "problem")
    found = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    if not found:
        return Finding("power mode", f"nvpmodel -q says nothing (status {done.returncode})", "problem", "try: sudo nvpmodel -q")
    full = found[1].upper().startswith("MAXN")
    return Finding("power mode", found[1], "ok", "" if full else "for full speed: sudo nvpmodel -m 0 && sudo jetson_clocks")


def _onnxruntime() -> Finding:
    try:
        import onnxruntime
    except ImportError as error:
        return Finding("onnxruntime", f"cannot be imported: {error}", "problem", "it is part of the core install: pip install tmc-export")
    return Finding("onnxruntime", f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}", "ok")


def _extras() -> list[Finding]:
    findings = []
    for extra, modules, brings in EXTRAS:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            value = f"missing {', '.join(missing)}; it {brings}"
            findings.append(Finding(f"extra [{extra}]", value, "absent", f"pip install 'tmc-export[{extra}]'"))
        else:
            findings.append(Finding(f"extra [{extra}]", brings, "ok"))
    return findings


def _python() -> Finding:
    advice = "building bundles needs 3.11 or newer" if sys.version_info < (3, 11) else ""
    return Finding("Python", f"{platform.python_version()} on {platform.machine()}", "ok", advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    low = free < 2**30
    return Finding("free disk", f"{gib(free)} at {os.fspath(folder)}", "problem" if low else "ok", "free some space" if low else "")


def _cache() -> Finding:
    try:
        cache = engine_cache()
    except TmcError as error:
        return Finding("engine cache", str(error), "problem")
    if cache is None:
        return Finding("engine cache", "switched off", "absent")
    count, size = cache.content()
    value = f"{count} engines, {gib(size)} of at most {gib(cache.limit)}, in {cache.folder}"
    return Finding("engine cache", value, "ok", f"to free it: rm -r {cache.folder}; {CACHE} names another place" if count else "")


def examine_machine(root: Path = Path("/"), folder: Path = Path(".")) -> tuple[tuple[Finding, ...], tuple[Builder, ...], CudaDevice | None]:
    """Look at this machine; works with none of it installed.

    Args:
        root: the root folder (a test gives another).
        folder: where free disk space is measured.

    Returns:
        The findings, the builders that work here, and the GPU.
    """
    device = cuda_device()
    standard, rtx = _builder("tensorrt", "TensorRT"), _builder("tensorrt-rtx", "TensorRT-RTX")
    findings = [_python(), _jetpack(root), *_gpu(device), standard[0], rtx[0], _memory(root), _power(), _disk(folder), _cache()]
    findings += [_onnxruntime(), *_extras()]
    return tuple(findings), tuple(builder for _, builder in (standard, rtx) if builder), device


def _examine(record: EngineRecord, bundle: Path, builders: tuple[Builder, ...], device: CudaDevice | None) -> Finding:
    title = f"engine {record.name}"
    flags = "".join(f" --capability {name}" for name in ([device.capability] if device else record.capabilities))
    again = f"rebuild with: tmc-export engine {bundle} --runtime {record.flavour}" + (flags if record.flavour == "tensorrt-rtx" else "")
    path = bundle / record.file
    if not path.is_file() or path.stat().st_size != record.bytes:
        return Finding(title, f"{record.file} is missing or of another size than recorded", "problem", again)
    here = next((builder for builder in builders if builder.flavour == record.flavour), None)
    if here is None:
        return Finding(title, f"made by {record.flavour} {record.version}, which is not installed here", "absent")
    if not same_release(record.version, here.version):
        return Finding(title, f"made by {record.flavour} {record.version}; this machine has {here.version}", "problem", again)
    if device and record.capabilities and device.capability not in record.capabilities:
        return Finding(title, f"made for {', '.join(record.capabilities)}; this GPU is {device.capability}", "problem", again)
    return Finding(title, f"{record.flavour} {record.version} for {', '.join(record.capabilities) or 'this GPU'}", "ok")


def examine_engines(bundle: Path, builders: tuple[Builder, ...], device: CudaDevice | None) -> tuple[Finding, ...]:
    """Look at a bundle's engines: present, of this TensorRT's version, of this GPU's architecture.

    Raises:
        BundleError: `engines/engines.json` is damaged.
    """
    records = read_engines(bundle)
    if not records:
        return (Finding("engines", f"none built in {bundle}", "absent", f"build them with: tmc-export engine {bundle}"),)
    return tuple(_examine(record, bundle, builders, device) for record in records)
