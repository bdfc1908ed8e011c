from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.api.calibration_data import digest_of, read_samples
from tmc_export.core.errors import RecipeError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.webp", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "secret.png").write_bytes(b"x")
    return folder


def written(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_lines_name_their_pictures_or_take_them_in_turn(tmp_path: Path, pictures: Path) -> None:
    path = written(
        tmp_path, '{"prompt": "one"}', "", '{"prompt": "two", "images": ["c.webp", "b.png"]}', '{"prompt": "three"}', '{"prompt": "four"}'
    )
    found = read_samples(path, pictures, 3, 2)
    assert [(s.prompt, [p.name for p in s.images], s.place.rpartition(":")[2]) for s in found] == [
        ("one", ["a.jpg"], "1"), ("two", ["c.webp", "b.png"], "3"), ("three", ["c.webp"], "4"),
    ]  # fmt: skip
    assert all(not s.images for s in read_samples(written(tmp_path, '{"prompt": "one"}'), None, 3, 0))


def test_the_digest_is_that_of_what_is_said_and_shown(tmp_path: Path, pictures: Path) -> None:
    path = written(tmp_path, '{"prompt": "one", "images": ["a.jpg"]}', '{"prompt": "two", "images": ["b.png"]}')
    before = digest_of(read_samples(path, pictures, 9, 1))
    assert before == digest_of(read_samples(path, pictures, 9, 1)) and len(before) == 64
    assert before != digest_of(read_samples(path, pictures, 9, 1)[::-1])
    (pictures / "b.png").write_bytes(b"another picture")
    assert before != digest_of(read_samples(path, pictures, 9, 1))


@pytest.mark.parametrize(("line", "says"), [
    ("what is this", "prompts.jsonl:2: not JSON"),
    ('["prompt"]', 'prompts.jsonl:2: a line needs a text "prompt"'),
    ('{"prompt": ""}', 'a line needs a text "prompt"'),
    ('{"prompt": "x", "image": "a.jpg"}', "unknown key 'image'"),
    ('{"prompt": "x", "images": "a.jpg"}', "not a list of names"),
    ('{"prompt": "x", "images": ["z.png"]}', "does not exist"),
    ('{"prompt": "x", "images": ["../secret.png"]}', "lies outside of"),
    ('{"prompt": "x", "images": ["a.jpg", "b.png"]}', "2 images, the recipe's inputs.images is 1"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, pictures: Path, line: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("(", r"\(")):
        read_samples(written(tmp_path, '{"prompt": "fine"}', line), pictures, 9, 1)


def test_nothing_to_read_is_an_error(tmp_path: Path, pictures: Path) -> None:
    path = written(tmp_path, '{"prompt": "x", "images": ["a.jpg"]}')
    with pytest.raises(RecipeError, match="cannot read"):
        read_samples(tmp_path / "none.jsonl", pictures, 9, 1)
    with pytest.raises(RecipeError, match="has no line"):
        read_samples(written(pictures, ""), pictures, 9, 1)
    with pytest.raises(RecipeError, match="is no folder"):
        read_samples(path, tmp_path / "none", 9, 1)
    with pytest.raises(RecipeError, match="names no folder"):
        read_samples(path, None, 9, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no picture"):
        read_samples(path, tmp_path / "empty", 9, 1)
