"""Engines that this machine has built before, and builds of engines that are killed or meet each other. TensorRT is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests._tiny import tmc
from tests.engine.conftest import _manifest, make_static
from tests.engine.test_standard import place
from tmc_export.engine import WAITING, EngineCache, EngineOptions, EngineReport, build_engines, read_engines

OPTIONS = EngineOptions(flavour="tensorrt", capabilities=())


class Machine:
    """A stand-in for TensorRT that writes down what it builds, a cache, and bundles of two engines."""

    def __init__(self, folder: Path, fake_module: Callable[[str, str], None]) -> None:
        self.folder = folder
        self.calls = place(fake_module, folder, "10.3.0", False)
        self.fake = folder / "fakes/tensorrt.py"
        self.cache = EngineCache(folder / "cache", 1 << 20)

    def bundle(self, name: str, *kinds: str) -> Path:
        made = self.folder / name
        (made / "engines").mkdir(parents=True)
        subgraphs = []
        for index, kind in enumerate(kinds or ("Relu", "Sigmoid")):
            make_static(made / f"onnx/g_{index}.onnx", kind)
            profile = {"name": "static", "shapes": {"hidden": [1, 4, 8]}}
            subgraphs.append({"name": f"g_{index}", "onnx": f"onnx/g_{index}.onnx", "precision": "float16", "profiles": [profile]})
        (made / "engines/profiles.json").write_text(json.dumps({"subgraphs": subgraphs}))
        (made / "manifest.json").write_text(_manifest())
        return made

    def build(self, bundle: Path, **more: object) -> list[EngineReport]:
        return list(build_engines(bundle, OPTIONS, cache=self.cache, **more))  # type: ignore[arg-type]

    def builds(self) -> int:
        """Count the engines built since the last call."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines.count('["build"]')

    def slow(self) -> Path:
        """From now on a build lasts until the returned file exists."""
        go = self.folder / "go"
        wait = f"import os, time\n        while not os.path.exists({str(go)!r}): time.sleep(0.02)\n        return"
        self.fake.write_text(self.fake.read_text().replace('return b"plan"', f'{wait} b"plan"'))
        return go


@pytest.fixture
def machine(tmp_path: Path, fake_module: Callable[[str, str], None]) -> Machine:
    return Machine(tmp_path, fake_module)


def states(reports: list[EngineReport]) -> list[str]:
    return ["built" if r.built else "cached" if r.cached else "kept" for r in reports]


# ---------------------------------------------------------------------------------------------------------------- the cache
def test_another_bundle_takes_what_was_built(machine: Machine) -> None:
    one, two = machine.bundle("one"), machine.bundle("two")
    assert states(machine.build(one)) == ["built", "built"] and machine.builds() == 2
    reports = machine.build(two)
    assert states(reports) == ["cached", "cached"] and machine.builds() == 0
    assert [(r.name, r.seconds, r.profiles) for r in reports] == [("g_0", 0.0, ("static",)), ("g_1", 0.0, ("static",))]
    assert read_engines(one) == read_engines(two)
    for record in read_engines(two):
        assert (two / record.file).samefile(one / record.file)  # on the disk once
        layers = [json.loads((b / f"{record.file}.layers.json").read_text()) for b in (one, two)]
        assert layers[0] == layers[1]
    assert states(machine.build(two)) == ["kept", "kept"]
    assert machine.cache.content() == (2, 8) and machine.cache.problems == []


def test_without_a_cache_nothing_is_kept(machine: Machine) -> None:
    build_engines(machine.bundle("one"), OPTIONS)
    build_engines(machine.bundle("two"), OPTIONS)
    assert machine.builds() == 4 and not machine.cache.folder.exists()


def test_force_builds_again(machine: Machine) -> None:
    machine.build(machine.bundle("one"))
    assert states(machine.build(machine.bundle("two"), force=True)) == ["built", "built"] and machine.cache.content()[0] == 2


@pytest.mark.parametrize("change", ["graph", "options", "version"])
def test_what_goes_into_an_engine_is_in_its_key(machine: Machine, change: str) -> None:
    machine.build(machine.bundle("one"))
    two, options = machine.bundle("two", "Tanh" if change == "graph" else "Relu", "Sigmoid"), OPTIONS
    if change == "options":
        options = EngineOptions(flavour="tensorrt", capabilities=(), builder_optimization_level=1)
    if change == "version":
        machine.fake.write_text(machine.fake.read_text().replace("10.3.0", "10.3.1"))
    reports = build_engines(two, options, cache=machine.cache)
    assert states(list(reports)) == ["built", "cached" if change == "graph" else "built"]


def only_entry(cache: EngineCache) -> Path:
    (report,) = cache.folder.glob("*/report.json")
    return report.parent


@pytest.mark.parametrize("damage", ["a byte", "cut", "gone", "report", "no report"])
def test_a_damaged_engine_is_noticed_and_built_again(machine: Machine, damage: str) -> None:
    machine.build(machine.bundle("one", "Relu"))
    entry = only_entry(machine.cache)
    engine = (entry / "engine").read_bytes()
    if damage in ("a byte", "cut", "gone"):
        (entry / "engine").unlink()  # the bundle's is the same file
    if damage in ("a byte", "cut"):
        (entry / "engine").write_bytes(engine[:-1] + (b"x" if damage == "a byte" else b""))
    if damage == "report":
        (entry / "report.json").write_text("{}")
    if damage == "no report":
        (entry / "report.json").unlink()
    (report,) = machine.build(machine.bundle("two", "Relu"))
    assert report.built and report.path.read_bytes() == engine
    warned = [w for w in report.warnings if "damaged" in w]
    assert len(warned) == (damage != "no report")  # such a folder was never whole
    assert states(machine.build(machine.bundle("three", "Relu"))) == ["cached"]


def test_what_was_used_longest_ago_goes_first(machine: Machine) -> None:
    machine.cache.limit = 3 * 4
    for index, kind in enumerate(("Relu", "Sigmoid", "Tanh")):
        machine.build(machine.bundle(kind, kind))
        report = next(p for p in machine.cache.folder.glob("*/report.json") if p.stat().st_mtime > 10**6)
        os.utime(report, (index, index))
    assert states(machine.build(machine.bundle("again", "Relu"))) == ["cached"]  # used just now
    machine.build(machine.bundle("Abs", "Abs"))
    assert machine.cache.content() == (3, 12)
    assert states(machine.build(machine.bundle("old", "Sigmoid"))) == ["built"]
    assert states(machine.build(machine.bundle("used", "Relu"))) == ["cached"]


def test_an_engine_above_the_limit_is_not_kept(machine: Machine) -> None:
    machine.cache.limit = 3
    assert states(machine.build(machine.bundle("one"))) == ["built", "built"] and machine.cache.content() == (0, 0)


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(machine: Machine) -> None:
    machine.cache.folder.write_text("a file")
    first, second = machine.build(machine.bundle("one"))
    assert first.built and second.built
    assert [w for w in first.warnings if f"the engine cache {machine.cache.folder} cannot be used" in w] and not second.warnings


def test_what_a_killed_builder_left_in_the_cache_is_removed(machine: Machine) -> None:
    machine.build(machine.bundle("one", "Relu"))
    left = machine.cache.folder / f".{only_entry(machine.cache).name}.99"
    left.mkdir()
    (left / "engine").write_text("half")
    assert states(machine.build(machine.bundle("two", "Relu"))) == ["cached"] and not left.exists()


def test_an_engine_of_tensorrt_rtx_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    cache, reports = EngineCache(tmp_path / "cache", 1 << 30), []
    for name in ("one", "two"):
        make_static(tmp_path / name / "onnx/g.onnx")
        (tmp_path / name / "engines").mkdir()
        subgraph = {"name": "g", "onnx": "onnx/g.onnx", "precision": "float32", "profiles": [{"name": "static", "shapes": {}}]}
        (tmp_path / name / "engines/profiles.json").write_text(json.dumps({"subgraphs": [subgraph]}))
        reports += build_engines(tmp_path / name, EngineOptions(), cache=cache)
    assert states(reports) == ["built", "cached"]
    assert reports[1].layers == reports[0].layers and reports[1].path.read_bytes() == reports[0].path.read_bytes()
    assert read_engines(tmp_path / "one") == read_engines(tmp_path / "two")
    other = build_engines(tmp_path / "two", EngineOptions(capabilities=("SM86",)), cache=cache)
    assert states(list(other)) == ["built"]  # for another GPU


# -------------------------------------------------------------------------------------------------------------- two at once
def at_once(machine: Machine, first: Path, second: Path) -> tuple[list[str], list[str], list[str]]:
    """Build two bundles, the second while the first is at work; return what became of the engines, and who waited."""
    go, waited, ends = machine.slow(), list[str](), dict[Path, list[str]]()

    def run(bundle: Path) -> None:
        def progress(name: str, phase: str, done: int, total: int) -> None:
            if phase == WAITING:
                waited.append(name)
                go.touch()

        ends[bundle] = states(machine.build(bundle, progress=progress))

    threads = [threading.Thread(target=run, args=(bundle,)) for bundle in (first, second)]
    threads[0].start()
    until(lambda: machine.calls.exists() and '["build"]' in machine.calls.read_text())
    threads[1].start()
    for thread in threads:
        thread.join(60)
    return ends[first], ends[second], waited


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_builds_and_the_other_takes(machine: Machine) -> None:
    ends = at_once(machine, machine.bundle("one", "Relu"), machine.bundle("two", "Relu"))
    assert ends == (["built"], ["cached"], ["g_0"]) and machine.builds() == 1


def test_two_in_one_bundle(machine: Machine) -> None:
    bundle = machine.bundle("one")
    assert at_once(machine, bundle, bundle)[2] == ["engines"] and machine.builds() == 2
    assert [r.name for r in read_engines(bundle)] == ["g_0", "g_1"]


# ------------------------------------------------------------------------------------------------------------------- killed
def command(bundle: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMC_EXPORT_CACHE_DIR": str(cache), "TMC_EXPORT_CACHE_GIB": "1"}
    line = [sys.executable, "-m", "tmc_export.cli", "engine", str(bundle), "--runtime", "tensorrt"]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_of_engines_goes_on_and_takes_its_builder_along(machine: Machine, tmp_path: Path) -> None:
    """Killed in the second engine: the first is kept, and the process that built the second does not outlive the command."""
    bundle, pids = machine.bundle("one"), tmp_path / "pids"
    machine.fake.write_text(
        machine.fake.read_text().replace('say("build");', f'say("build"); import os; print(os.getpid(), file=open({str(pids)!r}, "a"));')
    )
    text = machine.fake.read_text()
    machine.fake.write_text(
        text.replace('return b"plan"', f'import time\n        time.sleep(60 * (len(open({str(pids)!r}).readlines()) == 2)); return b"plan"')
    )
    process = command(bundle, tmp_path / "mine")
    until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
    process.kill()
    process.communicate()
    last = int(pids.read_text().splitlines()[1])
    until(lambda: not Path(f"/proc/{last}").exists() or "Z" in Path(f"/proc/{last}/stat").read_text().rsplit(")", 1)[1][:3])
    assert [r.name for r in read_engines(bundle)] == ["g_0"] and not (bundle / "engines/g_1.tensorrt.engine").exists()
    machine.fake.write_text(text)
    assert states(list(build_engines(bundle, OPTIONS))) == ["kept", "built"]
    assert not list((bundle / "engines").glob(".*"))


def test_a_changed_engine_is_built_again(machine: Machine) -> None:
    bundle = machine.bundle("one")
    build_engines(bundle, OPTIONS)
    (bundle / "engines/g_0.tensorrt.engine").write_bytes(b"plaN")  # of the recorded size
    assert states(list(build_engines(bundle, OPTIONS))) == ["built", "kept"]


@pytest.mark.parametrize("what", ["layers", "record"])
def test_a_full_disk_beside_the_engine_is_one_line(machine: Machine, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    bundle = machine.bundle("one")
    module = "tmc_export.engine.build" if what == "layers" else "tmc_export.engine.bundle"

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.write_whole", full)
        ran = tmc("engine", bundle, "--runtime", "tensorrt")
    assert ran.code == 5 and "No space left on device" in ran.error() and "free some space" in ran.err
    assert read_engines(bundle) == ()
    assert tmc("engine", bundle, "--runtime", "tensorrt").code == 0 and len(read_engines(bundle)) == 2


def test_the_command_line_uses_the_cache_and_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMC_EXPORT_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TMC_EXPORT_CACHE_GIB", "1")
    assert "built in" in tmc("engine", machine.bundle("one"), "--runtime", "tensorrt").out
    ran = tmc("engine", machine.bundle("two"), "--runtime", "tensorrt", "--json")
    assert [e["cached"] for e in json.loads(ran.out)] == [True, True]
    assert tmc("engine", machine.bundle("three"), "--runtime", "tensorrt").out.count("from the cache") == 2
    assert tmc("engine", machine.bundle("four"), "--runtime", "tensorrt", "--no-cache").out.count("built in") == 2
    found = {f["name"]: f for f in json.loads(tmc("doctor", "--json").out)["findings"]}["engine cache"]
    assert (
        found["value"].startswith("2 engines, 0.0 GiB of at most 1.0 GiB") and f"rm -r {tmp_path / 'mine' / 'engines'}" in found["advice"]
    )
    monkeypatch.setenv("TMC_EXPORT_CACHE_GIB", "lots")
    ran = tmc("engine", tmp_path / "one", "--runtime", "tensorrt", "--force")
    assert ran.code == 2 and "TMC_EXPORT_CACHE_GIB=lots" in ran.error()
