"""A bundle whose slots hold fp8 codes, from questions to answers, beside Hugging Face's model with a cache that is rounded here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.families._small import save_small_llava  # noqa: E402
from tests.quantize._slots import Scales, answered, kv, recipe  # noqa: E402
from tmc_export.api.bundling import build_bundle  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.runtime.session import Session, load  # noqa: E402
from tmc_export.verify._cache import Cache  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402
from tmc_export.verify.tolerances import tolerance  # noqa: E402

ROW, STEPS = "fp8 slots", 6
CUTS = {
    "none": "",
    "fastv": "{at: decoder.1, method: fastv, keep: 4}",  # scores with the keys in the slots; fewer rows go on
    "tokencarve": "{at: decoder.1, method: tokencarve, keep: 50%}",  # and takes rows out of the slots before it
    "pyramiddrop": "{at: decoder.1, method: pyramiddrop, layers: [1], keep: [50%]}",  # scores with the keys of the layer behind it
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two decoder layers, and data to calibrate on."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("fp8")
    save_small_llava(folder / "model", "llama", layers=2, vision_layers=2, image_size=42)
    (folder / "pictures").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (42, 42, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    lines = [{"prompt": text} for text in ("what is it", "the one on the left", "a thing of the other", "in it")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def bundle(home: Path) -> Callable[..., Path]:
    """`bundle(name, codes)` → a bundle with that cut, calibrated."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, codes: str = "fp8") -> Path:
        if (name, codes) not in made:
            path = recipe(home, f"{name}-{codes}", CUTS[name], quantize=kv(codes))
            path.write_text(path.read_text("utf-8").replace("compress:\n  - \n", "compress: []\n"), "utf-8")
            made[name, codes] = build_bundle(path, home / f"{name}-{codes}", record=False, engines=False).folder
        return made[name, codes]

    return make


def scales_of(bundle: Path) -> Scales:
    codes = open_manifest(bundle).program.kv
    assert codes is not None and codes.dtype == "fp8"
    return dict(codes.scales)


def rounded(rows: Any, scales: tuple[float, ...]) -> Any:
    """Keys or values `[1, g, T, d]` as E4M3 codes times the scale of their head."""
    scale = torch.tensor(scales)[None, :, None, None]
    return (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class RoundedCache(transformers.DynamicCache):  # type: ignore[misc]
    """Hugging Face's cache, which rounds what comes."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales

    def update(self, key: Any, value: Any, layer: int, *more: Any, **named: Any) -> Any:
        if self.scales:
            key, value = rounded(key, self.scales[f"{layer}.key"]), rounded(value, self.scales[f"{layer}.value"])
        return super().update(key, value, layer, *more, **named)


TURNS = (([5, 6, None, 7, 9, 11], 4), ([12, 8, 13, 14, 9, 10, 11, 6, 5, 17, 18], 3), ([7, 5], 2))
"""Ids of each turn, a picture for None, and tokens that are answered."""


def ours(session: Session, picture: Path, route: Any) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of every step of the conversation, and what each turn answered."""
    session.reset()
    logits, said = [], []
    for ids, count in TURNS:
        images = session.encode_images([str(picture)] if None in ids else [])
        prompt = session.prompt([session.program.image_token if i is None else i for i in ids], images)
        logits.append(session.run_prompt(prompt, route).logits.reshape(-1))
        said.append([])
        for _ in range(count):
            said[-1].append(int(logits[-1].argmax()))
            logits.append(session.decoder.step(said[-1][-1]))
    return logits, said


def theirs(home: Path, session: Session, picture: Path, said: list[list[int]], scales: Scales) -> list[np.ndarray]:
    """The same of Hugging Face's model, along the same answers."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(home / "model", dtype=torch.float32).eval()
    ((_, pixels),) = session.prompt([session.program.image_token], session.encode_images([str(picture)])).pixels
    cache, found = RoundedCache(scales), []
    patches = session.program.vision[0].tokens

    def feed(ids: list[int], **more: Any) -> None:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
        found.append(out.logits[0, -1].numpy())

    for (given, _), answers in zip(TURNS, said, strict=True):
        ids = [i for each in given for i in ([session.program.image_token] * patches if each is None else [each])]
        feed(ids, **({"pixel_values": torch.from_numpy(pixels)} if None in given else {}))
        for token in answers:
            feed([token])
    return found


def decibel(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    a, b = np.concatenate(got).astype(np.float64), np.concatenate(want).astype(np.float64)
    return float(10 * np.log10(np.square(b).sum() / np.square(a - b).sum()))


@pytest.mark.parametrize("route", ["auto", "chunked"])
def test_several_turns_are_hugging_face_s_with_a_rounded_cache(route: str, home: Path, bundle: Callable[..., Path]) -> None:
    session, scales, picture = load(bundle("none"), threads=1), scales_of(bundle("none")), home / "pictures" / "1.png"
    got, said = ours(session, picture, route)
    assert len(got) == sum(1 + count for _, count in TURNS)
    near = decibel(got, theirs(home, session, picture, said, scales))
    plain = decibel(got, theirs(home, session, picture, said, {}))
    assert near > 60 and 15 < plain < 40, (near, plain)
    for name, other in (("other scales", 1.05), ("the scales of int8", 448 / 127)):  # the negative twins
        wrong = theirs(home, session, picture, said, {n: tuple(s * other for s in each) for n, each in scales.items()})
        assert decibel(got, wrong) < near - 15, name


def test_scales_are_the_largest_magnitude_through_448(bundle: Callable[..., Path]) -> None:
    """What was seen of the data, by head: int8's scales of the same data are so much larger."""
    codes = open_manifest(bundle("none", "int8")).program.kv
    assert codes is not None and codes.dtype == "int8" and len(codes.scales) == 4
    for name, scales in scales_of(bundle("none")).items():
        np.testing.assert_allclose(np.array(scales) * 448, np.array(codes.scales[name]) * 127, rtol=1e-5)
        assert len(set(scales)) == 2, "a scale per head"


@contextmanager
def reference_rounds(scales: Scales) -> Iterator[None]:
    """While active, the reference (Hugging Face's attention, with the plan's cuts) keeps rows rounded by `rounded`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "_rounded", lambda self, rows, name: rounded(rows, scales[name]))
        yield


@pytest.mark.parametrize("name", ["fastv", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tokencarve", "pyramiddrop"))])
def test_cuts_read_and_prune_codes_as_a_rounded_reference_does(name: str, home: Path, bundle: Callable[..., Path]) -> None:
    session, scales, table = load(bundle(name), threads=1), scales_of(bundle(name)), tolerance("end_to_end", ROW)

    def judged(given: Scales, route: Any) -> tuple[list[bool], float]:
        with reference_rounds(given):
            cases = [c for script in ("one", "turns") for c in answered(home / f"{name}-fp8.yaml", home / "model", None, script, STEPS)]
        checks = play(session, cases, table, ROW, route)
        logits = [c.metrics.sqnr_db for c in checks if c.name.endswith("/logits") and c.metrics is not None]
        assert given is not scales or len(logits) == 3, [c.name for c in checks]
        return [c.passed for c in checks], min(logits, default=-np.inf)

    for route in ("auto", "chunked"):
        passed, least = judged(scales, route)
        assert all(passed) and least > 50, least
    passed, worst = judged({n: tuple(s * 1.05 for s in each) for n, each in scales.items()}, "auto")  # the negative twin
    assert not all(passed) and worst < least - 10
