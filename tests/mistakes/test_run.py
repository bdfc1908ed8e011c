"""Wrong questions to a good bundle: one line each, exit code 2; and an answer that fills the context."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests._tiny import RECIPE, tmc, write_recipe


def ask(bundle: Path, *args: object, prompt: str = "what is it") -> list[object]:
    return ["run", bundle, "--prompt", prompt, "--threads", 1, *args]


def refused(args: list[object], *says: str, code: int = 2) -> None:
    ran = tmc(*args)
    error = ran.error()
    assert ran.code == code and all(part in error for part in says), error
    assert ran.out == ""


def test_the_good_question_is_answered(built: Path, picture: Path) -> None:
    ran = tmc(*ask(built, "--image", picture, "--json"))
    assert ran.code == 0 and ran.err == ""
    answer = json.loads(ran.out)
    assert len(answer["tokens"]) == 16 and answer["finish"] == "length" and answer["visual_tokens"] == [9, 4]


def test_pictures(built: Path, picture: Path, tmp_path: Path) -> None:
    text, cut, empty = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "empty.png"
    text.write_text("not a picture")
    cut.write_bytes(picture.read_bytes()[:200])
    empty.write_bytes(b"")
    refused(ask(built, "--image", tmp_path / "none.png"), "none.png", "does not exist")
    refused(ask(built, "--image", tmp_path), str(tmp_path), "not a file")
    refused(ask(built, "--image", text), "text.png", "format")
    refused(ask(built, "--image", empty), "empty.png", "format")
    refused(ask(built, "--image", cut), "cut.png", "cannot be read")
    refused(ask(built, "--image", "https://example.org/a.png"), "https://example.org/a.png", "download it first")
    refused(ask(built, "--image", picture, "--image", picture), "2 pictures", "takes 1", "inputs.images: 2")


def test_a_fifo_is_no_picture(built: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    refused(ask(built, "--image", tmp_path / "pipe.png"), "pipe.png", "not a file")


def test_placeholders(built: Path, picture: Path) -> None:
    refused(ask(built, "--image", picture, "--plain", prompt="<image> <image> what"), "2 image placeholder", "1 picture")
    refused(ask(built, "--plain", prompt="<image> what"), "1 image placeholder", "0 picture")
    refused(ask(built, prompt="<image> what"), "1 image placeholder", "0 picture")
    assert tmc(*ask(built, "--image", picture, "--plain", "--max-new-tokens", 1, prompt="<image> what")).code == 0


def test_prompt_too_long_for_the_bucket(built: Path, picture: Path) -> None:
    refused(ask(built, "--image", picture, prompt="many words " * 40), "the bucket holds 41", "text_tokens")
    refused(ask(built, prompt="many words " * 400), "slots")


def test_empty_prompt(built: Path, picture: Path) -> None:
    refused(ask(built, "--plain", prompt=""), "empty")
    assert tmc(*ask(built, "--image", picture, "--max-new-tokens", 1, prompt="")).code == 0  # the chat form says something by itself


def test_prompt_that_is_no_text(built: Path) -> None:
    refused(ask(built, prompt="a\udcffb"), "position", "UTF-8")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["--max-new-tokens", "many"], "'many'"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top-p is 0"),
        (["--top-p", "1.5"], "top-p is 1.5"),
        (["--seed", "-1"], "seed is -1"),
        (["--threads", "-2"], "threads"),
        (["--threads", "0"], "threads"),
        (["--stop", ""], "stop"),
        (["--backend", "onnxruntme"], "did you mean 'onnxruntime'"),
        (["--backend", "tensorrt-rtz"], "did you mean 'tensorrt-rtx'"),
        (["--provider", "cudda"], "did you mean 'cuda'"),
        (["--backend", "tensorrt", "--provider", "cuda"], "provider 'cuda' is onnxruntime's"),
        (["--imge", "a.png"], "--imge"),
    ],
)
def test_options(built: Path, args: list[str], says: str) -> None:
    ran = tmc("run", built, "--prompt", "what", *args)
    assert ran.code == 2 and says in ran.error() and ran.out == ""


@pytest.mark.parametrize(("backend", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_backend_whose_package_is_missing(built: Path, backend: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    refused(ask(built, "--backend", backend), f"the package '{module}' is missing")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_this_onnxruntime_lacks(built: Path, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    refused(ask(built, "--provider", provider), "has no", "(it has CPUExecutionProvider)", "--provider cpu")


def test_prompt_is_required(built: Path) -> None:
    refused(["run", built], "--prompt")


def test_a_wrong_number_is_told_before_the_prompt_is_computed(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tmc_export.runtime.session import Session

    def never(*_: object) -> None:
        raise AssertionError("the prompt was computed")

    monkeypatch.setattr(Session, "run_prompt", never)
    refused(ask(built, "--max-new-tokens", "0"), "max_new_tokens")


def test_a_full_context_ends_the_answer(built: Path) -> None:
    ran = tmc(*ask(built, "--plain", "--max-new-tokens", 1000, "--json", prompt="what"))
    answer = json.loads(ran.out)
    assert ran.code == 0 and answer["finish"] == "context"
    # the block of fewest slots (4 visual, 32 text, 16 new) is full, and the last token needs no slot
    assert answer["prompt_tokens"] + len(answer["tokens"]) == 4 + 32 + 16 + 1
    ran = tmc(*ask(built, "--plain", "--max-new-tokens", 1000, prompt="what"))
    assert ran.code == 0 and "the context is full" in ran.err


@pytest.mark.parametrize("chat", [True, False])
def test_a_refused_turn_leaves_the_conversation_as_it_was(built: Path, chat: bool) -> None:
    from tmc_export.core.errors import RuntimeInputError
    from tmc_export.runtime.session import load

    session, plain = load(built, threads=1), load(built, threads=1)
    for each in (session, plain):
        each.turn((), "what", chat=chat, max_new_tokens=4)
    places = [s.block.capacity - s.used for s in session.decoder.slots]
    assert places[0] > places[1]  # a turn may fit the first block and not the second, when the first has written its keys
    for prompt in ("many words " * 400, "a" * (places[1] + 1), "<image> what"):
        with pytest.raises(RuntimeInputError):
            session.turn((), prompt, chat=chat, max_new_tokens=4)
    answers = [each.turn((), "and", chat=chat, max_new_tokens=4) for each in (session, plain)]
    assert answers[0].tokens == answers[1].tokens
    with pytest.raises(RuntimeInputError, match="slots"):
        for _ in range(20):
            session.turn((), "and what is that", chat=chat, max_new_tokens=4)
    session.reset()
    assert session.turn((), "what is it", chat=chat, max_new_tokens=4).finish == "length"


def test_a_bundle_without_pictures(model: Path, tmp_path: Path, picture: Path, built: Path) -> None:
    """`images: 0` is a legal recipe; a picture given to such a bundle is refused."""
    from tests._tiny import TEXT_ONLY

    (tmp_path / "model").symlink_to(model)
    assert RECIPE != TEXT_ONLY
    assert tmc("build", write_recipe(tmp_path, TEXT_ONLY), "-o", tmp_path / "text", "-q", "--no-record").code == 0
    refused(ask(tmp_path / "text", "--image", picture), "1 pictures given, the bundle takes 0")
    assert tmc(*ask(tmp_path / "text", "--max-new-tokens", 2)).code == 0
