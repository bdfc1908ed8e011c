"""Prompts: chat templates, image placeholders and their expansion.

A prompt takes one of two ways. *Chat*: messages are rendered by the checkpoint's own template, which puts one placeholder per picture.
*Plain*: the text is taken as it is; `place_images` puts the placeholders in front where it has none. Either way the text is encoded, and
`expand_image_tokens` makes every placeholder as long as its picture has visual tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._tokenizer import TextStream, Tokenizer, read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ChatTemplate", "TextStream", "Tokenizer", "expand_image_tokens", "place_images"]


class ChatTemplate:
    """A checkpoint's chat template, rendered in a sandbox with what Hugging Face offers to templates.

    Args:
        source: the template's text.
        special_tokens: names that the template may use, e.g. `bos_token`.

    Raises:
        BundleError: not a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"the chat template is not valid ({error}); correct chat_template.jinja in the checkpoint") from error
        self._special_tokens = dict(special_tokens)
        self.takes_parts = self._probe()

    @classmethod
    def from_folder(cls, folder: Path, special_tokens: Mapping[str, str], name: str = "default") -> ChatTemplate | None:
        """The template of a bundle or checkpoint; None where it has none.

        Looked for in `processor_config.json`, `chat_template.json`, `chat_template.jinja` (with `additional_chat_templates/`) and
        `tokenizer_config.json`, in this order, which is also the processors'.

        Args:
            folder: the bundle's or the checkpoint's folder.
            special_tokens: `Tokenizer.special_tokens`.
            name: which template, where there are several.

        Raises:
            BundleError: several templates, but none of this name; or a damaged file.
        """
        named = _read_templates(folder)
        if not named:
            return None
        if name not in named:
            raise BundleError(f"no chat template is named {name!r} in {folder}; choose one of {', '.join(sorted(named))}")
        return cls(named[name], special_tokens)

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str:
        """Messages to the text of a prompt.

        Args:
            messages: `{"role": ..., "content": text or parts}`, where a part is `{"type": "text", "text": ...}` or `{"type": "image"}`;
                `message` makes them.
            add_generation_prompt: whether the text ends where the answer begins.

        Returns:
            The text, with special tokens in it.

        Raises:
            RuntimeInputError: the template refuses these messages.
        """
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RuntimeInputError(f"the chat template refuses these messages ({error}); check roles and their order") from error

    def message(self, role: str, text: str, pictures: int = 0, image_token: str = "<image>") -> dict[str, object]:
        """One turn in the form that this template reads: pictures first, then the text.

        Args:
            role: `system`, `user` or `assistant`.
            text: what is said.
            pictures: how many pictures come with it.
            image_token: the placeholder, for templates that know text only.
        """
        if not self.takes_parts:
            return {"role": role, "content": f"{image_token}\n" * pictures + text}
        return {"role": role, "content": [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]}

    def _probe(self) -> bool:
        """Whether contents are lists of parts. A template for plain text prints the list itself, fails on it, or leaves its text out."""
        text = "tmc probe"
        try:
            rendered = self.render([{"role": "user", "content": [{"type": "text", "text": text}]}])
        except RuntimeInputError:
            return False
        return text in rendered and "{'type'" not in rendered and '{"type"' not in rendered


def place_images(prompt: str, pictures: int, image_token: str, *, before: str = "", after: str = "\n") -> str:
    """Put placeholders into a plain prompt that has none: one per picture, at the beginning, as LLaVA's training prompts are written.

    Args:
        prompt: the user's text.
        pictures: how many pictures come with it.
        image_token: the placeholder, e.g. `<image>`.
        before: what stands in front of each placeholder; Qwen2-VL wants `<|vision_start|>`.
        after: what stands behind it; Qwen2-VL wants `<|vision_end|>`.

    Returns:
        The prompt; unchanged where it already has a placeholder (`expand_image_tokens` checks the number).

    >>> place_images("What is this?", 2, "<image>")
    '<image>\\n<image>\\nWhat is this?'
    """
    if image_token in prompt:
        return prompt
    return (before + image_token + after) * pictures + prompt


def expand_image_tokens(ids: Sequence[int], image_token_id: int, counts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Repeat each placeholder as often as its picture has visual tokens.

    Args:
        ids: the encoded prompt, with one placeholder per picture.
        image_token_id: the placeholder's id.
        counts: visual tokens per picture, in the order of the placeholders.

    Returns:
        ids: int64 `[n]`.
        group: int32 `[n]`: 0 for text, i + 1 for the tokens of picture i.

    Raises:
        RuntimeInputError: the numbers of placeholders and pictures differ.

    >>> [part.tolist() for part in expand_image_tokens([5, 9, 6], 9, [3])]
    [[5, 9, 9, 9, 6], [0, 1, 1, 1, 0]]
    """
    given = np.asarray(ids, dtype=np.int64)
    places = np.flatnonzero(given == image_token_id)
    if len(places) != len(counts):
        more = (
            "give a picture for each placeholder"
            if len(places) > len(counts)
            else "write one placeholder per picture, or none to have them put in front"
        )
        raise RuntimeInputError(f"the prompt has {len(places)} image placeholder(s) for {len(counts)} picture(s); {more}")
    if any(count < 1 for count in counts):
        raise RuntimeInputError(f"visual tokens per picture are {list(counts)}; each picture needs at least one")
    repeats = np.ones(given.shape[0], dtype=np.int64)
    repeats[places] = counts
    group = np.zeros(given.shape[0], dtype=np.int32)
    group[places] = np.arange(1, len(places) + 1)
    return np.repeat(given, repeats), np.repeat(group, repeats)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the answers for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _plain(value: object) -> object:
    """Only JSON's types reach a template, so that it has no method to call; anything else becomes the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _read_templates(folder: Path) -> dict[str, str]:
    """All templates by name, from the first place that has any."""
    for value in (
        read_json(folder / "processor_config.json").get("chat_template"),
        read_json(folder / "chat_template.json").get("chat_template"),
        _template_files(folder),
        read_json(folder / "tokenizer_config.json").get("chat_template"),
    ):
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list):
            value = {item.get("name"): item.get("template") for item in value if isinstance(item, Mapping)}
        if isinstance(value, Mapping) and value:
            found = {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}
            if len(found) != len(value):
                raise BundleError(f"a chat template in {folder} has no name or no text; give both")
            return found
    return {}


def _template_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except UnicodeDecodeError as error:
        raise BundleError(f"a chat template in {folder} is not UTF-8 text ({error}); build the bundle again") from error
