"""Pictures and questions for tiny-llava: a 4x4 grid of coloured shapes and handwritten digits.

A scene follows from its seed and split alone. Nothing here needs torch or transformers.

>>> one = scene(0, "heldout")
>>> one.image.size
(112, 112)
>>> [question.kind for question in one.questions]
['what', 'colour', 'digit', 'exist', 'count', 'describe']
"""

import functools
import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["CELLS", "COLOURS", "KINDS", "SHAPES", "SIDE", "SPLITS", "Cell", "Question", "Scene", "arrange", "ask", "draw", "scene"]

SIDE = 112  # pixels; 14 patches of 8
GRID = 4
CELL = SIDE // GRID
STAMP = 24  # pixels; a digit's side
COLOURS = {"red": (220, 50, 50), "green": (50, 190, 70), "blue": (60, 90, 230), "yellow": (235, 210, 50)}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # name: plural
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
KINDS = ("what", "colour", "digit", "exist", "count", "describe")
SPLITS = {"train": (0, 1400), "heldout": (1400, 1797)}  # rows of scikit-learn's digits


@dataclass(frozen=True)
class Cell:
    """What lies in one cell.

    Attributes:
        thing: A shape, a digit "0" to "9", or "empty".
        colour: A shape's colour; "white" for a digit, "none" for an empty cell.
    """

    thing: str = "empty"
    colour: str = "none"

    @property
    def words(self) -> str:
        """The answer to "what is at …"."""
        if self.thing == "empty":
            return "nothing"
        return f"digit {self.thing}" if self.colour == "white" else f"{self.colour} {self.thing}"


@dataclass(frozen=True)
class Question:
    """One question about a scene; its kind is one of KINDS."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A 112x112 RGB picture, at most one question of each kind, and the 16 cells, a1 b1 … d4."""

    image: Image.Image
    questions: tuple[Question, ...]
    cells: tuple[Cell, ...]


def scene(seed: int, split: str, density: float | None = None) -> Scene:
    """Draws the scene of a seed and asks about it.

    Args:
        seed: Any integer; equal seeds give equal pictures and questions.
        split: "train" or "heldout": which digit scans may appear.
        density: Share of cells that hold something; None draws it from 0.35 to 0.85.

    Returns:
        The scene. It lacks the "colour" question without a shape, the "digit" question without a digit.

    Raises:
        ValueError: The split is unknown.
    """
    rng = random.Random(f"{split}:{seed}")
    cells = arrange(rng, rng.uniform(0.35, 0.85) if density is None else density)
    image = draw(cells, rng, split)
    asked = (ask(cells, kind, rng) for kind in KINDS)
    return Scene(image, tuple(question for question in asked if question is not None), cells)


def arrange(rng: random.Random, density: float) -> tuple[Cell, ...]:
    """Fills 16 cells: `density` of them in expectation, 35 % of those with digits."""
    return tuple(_fill(rng, density) for _ in CELLS)


def _fill(rng: random.Random, density: float) -> Cell:
    chance = rng.random()
    if chance > density:
        return Cell()
    if chance < 0.35 * density:
        return Cell(str(rng.randrange(10)), "white")
    return Cell(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)))


def draw(cells: Sequence[Cell], rng: random.Random, split: str) -> Image.Image:
    """Draws cells on a dark ground: places, sizes and colours vary a little, noise has sigma 6 of 255.

    Raises:
        ValueError: The split is unknown.
    """
    ground = rng.randrange(10, 60)
    image = Image.new("RGB", (SIDE, SIDE), tuple(ground + rng.randrange(12) for _ in "rgb"))
    pen = ImageDraw.Draw(image)
    stamps: list[tuple[int, int, NDArray[np.float32]]] = []
    scans = _scans(split)
    for index, cell in enumerate(cells):
        if cell.thing == "empty":
            continue
        x = index % GRID * CELL + CELL // 2 + rng.randint(-2, 2)
        y = index // GRID * CELL + CELL // 2 + rng.randint(-2, 2)
        if cell.colour == "white":
            stamps.append((x, y, rng.choice(scans[int(cell.thing)])))
        else:
            _draw_shape(pen, cell, x, y, rng)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 6, (SIDE, SIDE, 3))
    pixels = np.asarray(image, np.float32) + noise.astype(np.float32)
    for x, y, ink in stamps:
        left, top = (max(0, min(SIDE - STAMP, centre - STAMP // 2)) for centre in (x, y))
        under = pixels[top : top + STAMP, left : left + STAMP]
        under += ink[..., None] * (235 - under)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_shape(pen: ImageDraw.ImageDraw, cell: Cell, x: int, y: int, rng: random.Random) -> None:
    red, green, blue = (max(0, min(255, value + rng.randint(-25, 25))) for value in COLOURS[cell.colour])
    fill, reach, arm = (red, green, blue), rng.randint(8, 11), 3
    if cell.thing == "circle":
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
    elif cell.thing == "square":
        pen.rectangle((x - reach, y - reach, x + reach, y + reach), fill=fill)
    elif cell.thing == "triangle":
        pen.polygon([(x, y - reach), (x - reach, y + reach), (x + reach, y + reach)], fill=fill)
    else:
        pen.rectangle((x - reach, y - arm, x + reach, y + arm), fill=fill)
        pen.rectangle((x - arm, y - reach, x + arm, y + reach), fill=fill)


@functools.cache
def _scans(split: str) -> tuple[tuple[NDArray[np.float32], ...], ...]:
    """A split's scans by digit, each [24, 24] from 0 (paper) to 1 (ink)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    try:
        digits = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise ImportError("the scenes use scikit-learn's handwritten digits; pip install scikit-learn") from error
    by_digit: list[list[NDArray[np.float32]]] = [[] for _ in range(10)]
    for row in range(*SPLITS[split]):
        small = Image.fromarray((digits.images[row] / 16 * 255).astype(np.uint8))
        large = np.asarray(small.resize((STAMP, STAMP), Image.Resampling.BILINEAR), np.float32)
        by_digit[int(digits.target[row])].append(large / np.float32(255))
    return tuple(tuple(scans) for scans in by_digit)


def ask(cells: Sequence[Cell], kind: str, rng: random.Random) -> Question | None:
    """Asks one question of a kind.

    Returns:
        The question, or None where the scene allows none (no shape for "colour", no digit for "digit").

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    shapes = [place for place, cell in enumerate(cells) if cell.colour in COLOURS]
    digits = [place for place, cell in enumerate(cells) if cell.colour == "white"]
    if kind == "what":
        filled = shapes + digits
        place = rng.choice(filled) if filled and rng.random() < 0.85 else rng.randrange(len(cells))
        return Question(kind, f"what is at {CELLS[place]}", cells[place].words)
    if kind == "colour":
        if not shapes:
            return None
        place = rng.choice(shapes)
        return Question(kind, f"what colour is {CELLS[place]}", cells[place].colour)
    if kind == "digit":
        if not digits:
            return None
        place = rng.choice(digits)
        return Question(kind, f"what digit is at {CELLS[place]}", cells[place].thing)
    if kind == "exist":
        return _ask_exist(cells, shapes, rng)
    if kind == "count":
        return _ask_count(cells, rng)
    row = rng.randrange(GRID)
    return Question(kind, f"describe row {row + 1}", " , ".join(cell.words for cell in cells[row * GRID : (row + 1) * GRID]))


def _ask_exist(cells: Sequence[Cell], shapes: Sequence[int], rng: random.Random) -> Question:
    present = sorted({cells[place].words for place in shapes})
    absent = [words for shape in SHAPES for colour in COLOURS if (words := f"{colour} {shape}") not in present]
    wanted = rng.choice(present if not absent or (present and rng.random() < 0.5) else absent)
    return Question("exist", f"is there a {wanted}", "yes" if wanted in present else "no")


def _ask_count(cells: Sequence[Cell], rng: random.Random) -> Question:
    about = rng.choice(("shape", "colour", "digits"))
    if about == "shape":
        shape = rng.choice(list(SHAPES))
        return Question("count", f"how many {SHAPES[shape]}", str(sum(cell.thing == shape for cell in cells)))
    if about == "colour":
        colour = rng.choice(list(COLOURS))
        return Question("count", f"how many {colour} things", str(sum(cell.colour == colour for cell in cells)))
    return Question("count", "how many digits", str(sum(cell.colour == "white" for cell in cells)))
