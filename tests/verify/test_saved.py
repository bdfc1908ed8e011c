"""What a device saved: the runtime's own outputs pass, and every way in which a file can be wrong is found and named."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests._tiny import RECIPE, listing, tmc, write_recipe
from tmc_export.bundle.read import open_manifest
from tmc_export.bundle.write import seal
from tmc_export.core.errors import ParityError, RuntimeInputError
from tmc_export.runtime.session import load
from tmc_export.verify import replay as replaying
from tmc_export.verify.ladder import saved_ladder
from tmc_export.verify.recorded import FOLDER, read_cases, write_case
from tmc_export.verify.saved import Saved, read_outputs, write_outputs

pytest.importorskip("torch")

Change = Callable[[dict[str, np.ndarray]], object]


@pytest.fixture(scope="module")
def built(tiny: Path) -> Path:
    return tiny / "bundle"


@pytest.fixture(scope="module")
def played(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runtime saved; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "from_device.npz"
    ran = tmc("replay", built, "-o", path)
    assert ran.code == 0, ran.err
    assert str(path) in ran.out and "playing one, whole ..." in ran.err and "playing one, in chunks ..." in ran.err
    return path


@pytest.fixture
def damaged(played: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """`damaged(change)` → a copy of the file with changed arrays."""

    def make(change: Change) -> Path:
        saved = read_outputs(played)
        arrays = {name: array.copy() for name, array in saved.arrays.items()}
        change(arrays)
        write_outputs(tmp_path / "changed.npz", replace(saved, arrays=arrays))
        return tmp_path / "changed.npz"

    return make


# ----------------------------------------------------------------------------------------------------------------- good
def test_what_the_runtime_saves_passes(built: Path, played: Path) -> None:
    ran = tmc("verify", built, "--outputs", played)
    assert ran.code == 0, ran.err
    files, outputs = ran.out.splitlines()
    assert files.startswith("files: passed") and outputs.startswith("saved outputs: passed")
    assert "onnxruntime" in outputs and "prefilled whole and in chunks" in outputs


def test_it_is_judged_as_the_end_to_end_rung_judges(built: Path, played: Path) -> None:
    """The same comparisons, and one more per turn: the tokens agree with the logits."""
    rung = next(r for r in json.loads(tmc("verify", built, "--json").out)["rungs"] if r["name"] == "onnxruntime end to end")
    mine = json.loads(tmc("verify", built, "--outputs", played, "--json").out)["rungs"][1]
    turns = sum(len(c.turns) for c in read_cases(built))
    assert mine["checks"] == rung["checks"] + 2 * turns and mine["worst"] == rung["worst"]


def test_the_file_says_what_the_page_says(built: Path, played: Path) -> None:
    with np.load(played, allow_pickle=False) as data:
        meta = json.loads(str(data["meta"]))
        names = set(data.files) - {"meta"}
        steps = data["auto.one.0.logits"].shape[0]
        assert data["auto.one.0.tokens"].tolist() == data["auto.one.0.logits"].argmax(-1).tolist() and data["auto.one.0.rows"].shape == (2,)
    assert steps == len(next(c for c in read_cases(built) if c.name == "one").turns[0].expected.tokens)
    whats = {name.split(".", 3)[3] for name in names}
    assert whats == {"logits", "tokens", "rows", "picture.0.tokens", "kept.1.0"}
    recorded = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in (built / "parity").glob("*.npz")}
    assert meta["conversations"] == recorded and meta["outputs"] == 1 and meta["routes"] == ["auto", "chunked"]
    assert meta["products"] == "float32"
    printed = subprocess.run(
        ["sha256sum", *sorted(f"onnx/{p.name}" for p in (built / "onnx").iterdir())], cwd=built, capture_output=True, check=True
    )
    assert meta["graphs"] == hashlib.sha256(printed.stdout).hexdigest()


def test_equal_outputs_give_equal_bytes(played: Path, tmp_path: Path) -> None:
    write_outputs(tmp_path / "again.npz", read_outputs(played))
    assert (tmp_path / "again.npz").read_bytes() == played.read_bytes()


def test_one_route_is_enough_and_is_said(built: Path, played: Path, tmp_path: Path) -> None:
    saved = read_outputs(played)
    arrays = {name: array for name, array in saved.arrays.items() if name.startswith("auto.")}
    write_outputs(tmp_path / "auto.npz", replace(saved, routes=("auto",), arrays=arrays))
    ladder = saved_ladder(built, tmp_path / "auto.npz")
    assert ladder.passed and "in chunks: not run" in ladder.text()


def test_half_precision_files_are_read(built: Path, damaged: Callable[[Change], Path]) -> None:
    """The type may be another float; the values are judged: here float16 rounding exceeds float32's tolerance."""
    path = damaged(lambda a: a.update({n: v.astype(np.float64) for n, v in a.items() if n.endswith(".logits")}))
    assert saved_ladder(built, path).passed
    path = damaged(lambda a: a.update({n: v.astype(np.float16) for n, v in a.items() if n.endswith(".logits")}))
    assert not saved_ladder(built, path).passed


def test_tf32_is_judged_as_half_precision(built: Path, played: Path, tmp_path: Path) -> None:
    """What 10 bits of mantissa do to logits passes where the file says so, and fails where it does not."""
    saved, ladders = read_outputs(played), {}
    assert saved.products == "float32", "onnxruntime on a CPU"
    rounded = {n: v.astype(np.float16).astype(np.float32) if n.endswith(".logits") else v for n, v in saved.arrays.items()}
    for products in ("tf32", "float32"):
        write_outputs(tmp_path / "file.npz", replace(saved, arrays=rounded, products=products))
        ladders[products] = saved_ladder(built, tmp_path / "file.npz")
    assert ladders["tf32"].passed and not ladders["float32"].passed
    assert "judged as float16, because its float32 is TF32" in ladders["tf32"].text() and "TF32" not in ladders["float32"].text()


def test_a_device_s_products_are_tf32(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "load", lambda bundle, backend, **named: load(bundle, **named))  # onnxruntime in a device's place
    assert {b: replaying.replay(built, backend=b, routes=["auto"]).products for b in ("tensorrt-rtx", "onnxruntime")} == {
        "tensorrt-rtx": "tf32", "onnxruntime": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("verb", ["replay", "verify"])
def test_neither_verb_needs_torch(built: Path, played: Path, tmp_path: Path, verb: str) -> None:
    code = (
        "import sys\nfrom tmc_export.cli import main\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'onnx', 'onnx_ir'): raise ImportError('refused: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "main(sys.argv[1:], prog_name='tmc-export')\n"
    )
    args = ["replay", str(built), "-o", str(tmp_path / "x.npz")] if verb == "replay" else ["verify", str(built), "--outputs", str(played)]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------------- damaged
ONE = "auto.one.0."


def poke(name: str, place: tuple[int, ...], value: float) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][place] = value

    return change


def other_token(arrays: dict[str, np.ndarray]) -> None:
    arrays[f"{ONE}tokens"][1] = (arrays[f"{ONE}tokens"][1] + 1) % arrays[f"{ONE}logits"].shape[1]


def another_kept(arrays: dict[str, np.ndarray]) -> None:
    kept = arrays[f"{ONE}kept.1.0"]
    kept[0] = next(i for i in range(9) if i not in kept)
    kept.sort()


WRONG: dict[str, tuple[Change, str]] = {
    "missing logits": (lambda a: a.pop(f"{ONE}logits"), r"one/turn 1: missing: logits"),
    "missing tokens": (lambda a: a.pop(f"{ONE}tokens"), r"missing: tokens"),
    "missing kept": (lambda a: a.pop(f"{ONE}kept.1.0"), r"missing: kept\.1\.0"),
    "missing in chunks": (lambda a: a.pop("chunked.one.0.rows"), r"chunked one/turn 1: missing: rows"),
    "extra of a turn": (lambda a: a.update({f"{ONE}kept.7.0": np.zeros(1, np.int64)}), r"not an output of this bundle: kept\.7\.0"),
    "extra turn": (lambda a: a.update({"auto.one.9.logits": np.zeros((1, 2))}), r"belong to no recorded turn: auto\.one\.9\.logits"),
    "extra name": (lambda a: a.update({"notes": np.zeros(3)}), r"1 arrays belong to no recorded turn: notes"),
    "NaN": (poke(f"{ONE}logits", (2, 3), np.nan), r"one/turn 1/logits.*1 of \d+ values are not finite"),
    "infinity in tokens": (poke(f"{ONE}picture.0.tokens", (0, 0), np.inf), r"picture 1/tokens.*not finite"),
    "one value off": (poke(f"{ONE}logits", (3, 5), 99.0), r"one/turn 1/logits.*differs by .* at \[3, 5\]"),
    "off only in chunks": (poke("chunked.one.0.logits", (3, 5), 99.0), r"chunked one/turn 1/logits.*differs by"),
    "a step short": (lambda a: a.update({f"{ONE}logits": a[f"{ONE}logits"][:-1]}), r"logits.*shape \[\d+, \d+\], expected"),
    "another axis order": (lambda a: a.update({f"{ONE}logits": a[f"{ONE}logits"].T}), r"logits.*shape"),
    "a token the logits deny": (other_token, r"one/turn 1/tokens.*token \d+ at step 1, the logits say \d+"),
    "a token outside": (poke(f"{ONE}tokens", (0,), 10**9), r"outside the vocabulary"),
    "a token too few": (lambda a: a.update({f"{ONE}tokens": a[f"{ONE}tokens"][1:]}), r"tokens, \d+ steps of logits"),
    "another kept place": (another_kept, r"fastv at decoder\.1.*onnx/compress_1\.onnx.*no tie"),
    "other KV rows": (poke(f"{ONE}rows", (1,), 3), r"KV rows.*the reference holds"),
    "integers for floats": (lambda a: a.update({f"{ONE}logits": a[f"{ONE}logits"].astype(np.int64)}), r"logits is int64, it must be float"),
    "floats for integers": (lambda a: a.update({f"{ONE}rows": a[f"{ONE}rows"].astype(np.float32)}), r"rows is float32, it must be integer"),
    "text": (lambda a: a.update({f"{ONE}rows": np.array(["1", "2"])}), r"rows is <U1, it must be integer"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_file_fails_and_says_where(built: Path, damaged: Callable[[Change], Path], how: str) -> None:
    import re

    change, says = WRONG[how]
    ran = tmc("verify", built, "--outputs", damaged(change))
    assert ran.code == 4, ran.out + ran.err
    ran.error()
    assert re.search(says, ran.out), ran.out


def test_everything_missing_is_no_success(built: Path, damaged: Callable[[Change], Path]) -> None:
    ladder = saved_ladder(built, damaged(lambda a: a.clear()))
    assert not ladder.passed and all("missing" in c.note for c in ladder.rungs[1].checks)


def test_a_tie_leaves_out_the_rest_of_the_conversation(built: Path, played: Path, tmp_path: Path) -> None:
    """Another place within the tie margin is counted, and wrong logits behind it are not blamed; without the margin they are."""
    for margin, excused in ((1e-9, True), (0.5, False)):
        bundle = Path(shutil.copytree(built, tmp_path / f"bundle-{excused}"))
        case = next(c for c in read_cases(bundle) if c.name == "one")
        turn = case.turns[0]
        stages = tuple(replace(s, margin=margin, scores=np.ones(9, np.float32)) for s in turn.expected.stages)
        write_case(bundle / FOLDER, replace(case, turns=(replace(turn, expected=replace(turn.expected, stages=stages)),)))
        manifest = seal(bundle, open_manifest(bundle))
        saved = read_outputs(played)
        arrays = {name: array.copy() for name, array in saved.arrays.items()}
        another_kept(arrays)
        arrays[f"{ONE}logits"][3, 5] = 99
        conversations = {**saved.conversations, "one": manifest.files["parity/one.npz"].sha256}
        write_outputs(tmp_path / "tie.npz", replace(saved, arrays=arrays, conversations=conversations))
        ladder = saved_ladder(bundle, tmp_path / "tie.npz")
        assert ladder.passed is excused, ladder.text()
        assert ("1 ties" in ladder.text()) is excused and ("left out after" in ladder.text()) is excused


# ---------------------------------------------------------------------------------------------------------- other files
def test_another_bundles_file_is_refused(built: Path, played: Path, tmp_path: Path) -> None:
    saved = read_outputs(played)
    write_outputs(tmp_path / "graphs.npz", replace(saved, graphs="0" * 64))
    with pytest.raises(ParityError, match=r"belongs to another bundle: the sha256 over onnx/ is 000000000000"):
        saved_ladder(built, tmp_path / "graphs.npz")
    write_outputs(tmp_path / "case.npz", replace(saved, conversations={**saved.conversations, "one": "0" * 64}))
    with pytest.raises(ParityError, match="belongs to another bundle: its recorded conversations one have another sha256"):
        saved_ladder(built, tmp_path / "case.npz")
    fewer = {name: digest for name, digest in saved.conversations.items() if name != "text"}
    write_outputs(tmp_path / "fewer.npz", replace(saved, conversations=fewer))
    ran = tmc("verify", built, "--outputs", tmp_path / "fewer.npz")
    assert ran.code == 4 and "text" in ran.error()


def test_a_quantized_twin_is_another_bundle(built: Path, played: Path, tmp_path: Path) -> None:
    """Its recorded conversations may be the same, byte for byte: only the graphs tell them apart."""
    (tmp_path / "model").symlink_to(built.parent / "model")
    recipe = write_recipe(tmp_path, RECIPE.replace("quantize: {}", "quantize: {decoder: {weights: fp16}}"))
    assert tmc("build", recipe, "-o", tmp_path / "half", "-q").code == 0
    ran = tmc("verify", tmp_path / "half", "--outputs", played)
    assert ran.code == 4 and "belongs to another bundle" in ran.error()
    assert tmc("replay", tmp_path / "half", "-o", tmp_path / "half.npz").code == 0
    assert tmc("verify", tmp_path / "half", "--outputs", tmp_path / "half.npz").code == 0


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, meta=np.array({"outputs": 1}, dtype=object))


UNREADABLE: dict[str, Callable[[Path, bytes], object]] = {
    "nothing there": lambda path, data: None,
    "empty": lambda path, data: path.write_bytes(b""),
    "cut short": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "a flipped byte": lambda path, data: path.write_bytes(data[:2000] + bytes([data[2000] ^ 0xFF]) + data[2001:]),
    "text": lambda path, data: path.write_text("logits: 1"),
    "one array": lambda path, data: np.save(path.open("wb"), np.zeros(3)),
    "pickles": lambda path, data: pickled(path),
    "no meta": lambda path, data: np.savez(path.open("wb"), logits=np.zeros(3)),
    "meta is no JSON": lambda path, data: np.savez(path.open("wb"), meta=np.array("{")),
    "meta is a list": lambda path, data: np.savez(path.open("wb"), meta=np.array("[]")),
    "a recorded conversation": lambda path, data: np.savez(path.open("wb"), meta=np.array("[{}]")),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_what_is_no_such_file_is_one_line(built: Path, played: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "file.npz"
    UNREADABLE[how](path, played.read_bytes())
    ran = tmc("verify", built, "--outputs", path)
    assert ran.code == 2 and "file.npz" in ran.error() and ran.out == ""


@pytest.mark.parametrize(
    ("meta", "says"),
    [({"outputs": 2}, "version 2"), ({"routes": ["chunked"]}, "it takes 'auto'"), ({"routes": ["auto", "sideways"]}, "it takes 'auto'"),
     ({"conversations": 3}, "cannot be read"), ({"products": "int8"}, "products are 'int8'; it takes float32 or tf32")],
)  # fmt: skip
def test_meta_is_checked(played: Path, tmp_path: Path, meta: dict[str, object], says: str) -> None:
    with np.load(played, allow_pickle=False) as data:
        right = json.loads(str(data["meta"]))
    with (tmp_path / "file.npz").open("wb") as file:
        np.savez(file, meta=np.array(json.dumps({**right, **meta})))
    with pytest.raises(RuntimeInputError, match=says):
        read_outputs(tmp_path / "file.npz")


def test_outputs_and_model_exclude_each_other(built: Path, played: Path) -> None:
    ran = tmc("verify", built, "--outputs", played, "--model", built.parent / "model")
    assert ran.code == 2 and "leave --model" in ran.error()


# ---------------------------------------------------------------------------------------------------------------- replay
def test_replay_loses_nobodys_file(built: Path, played: Path, tmp_path: Path) -> None:
    path = tmp_path / "thesis.npz"
    path.write_bytes(b"years of work")
    ran = tmc("replay", built, "-o", path)
    assert ran.code == 2 and "is no file of saved outputs" in ran.error() and path.read_bytes() == b"years of work"
    shutil.copyfile(played, path)
    assert tmc("replay", built, "-o", path).code == 0, "its own file is replaced"
    ran = tmc("replay", built, "-o", tmp_path / "nowhere" / "x.npz")
    assert ran.code == 2 and "does not exist" in ran.error()
    assert list(listing(tmp_path)) == ["thesis.npz"]


def test_a_write_that_fails_leaves_nothing(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write_outputs(tmp_path / "x.npz", Saved({}, "", ("auto",), "", {}))
    assert list(tmp_path.iterdir()) == []


def test_without_recorded_conversations_nothing_is_shown(built: Path, played: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    shutil.rmtree(bundle / "parity")
    seal(bundle, open_manifest(bundle))
    ran = tmc("replay", bundle, "-o", tmp_path / "x.npz")
    assert ran.code == 2 and "--no-record" in ran.error() and not (tmp_path / "x.npz").exists()
    ran = tmc("verify", bundle, "--outputs", played)
    assert ran.code == 2 and "--no-record" in ran.error()


def test_a_backend_that_cannot_run_here_says_so(built: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here: its backend may run")
    ran = tmc("replay", built, "-o", tmp_path / "x.npz", "--backend", "tensorrt")
    assert ran.code == 2 and "the package 'tensorrt' is missing" in ran.error() and not (tmp_path / "x.npz").exists()
