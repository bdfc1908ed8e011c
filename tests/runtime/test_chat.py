"""Prompts: tokenizer, streaming and chat templates equal to transformers'; placeholders expanded or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._chat import ChatTemplate, Tokenizer, expand_image_tokens, place_images

transformers = pytest.importorskip("transformers")

TINY = Path(__file__).parents[2] / "examples" / "tiny-llava"
CORPUS = [
    "what is at b1 ? a red circle, naïve café, grüße, 東京 🙂👩‍👩‍👧 ½ and so on",
    "USER: two  spaces\n\nlines\ttabs",
    "日本語 テキスト 🙂🙂",
] * 3
TEXTS = ["what is at b1 ?", " leading and trailing ", "東京 🙂 naïve\n\n½", "👩‍👩‍👧", "<s> USER: <image> what </s>", "a<|im_end|>b", ""]

# The style of Qwen2-VL: roles in markers, pictures as a padded placeholder between two markers, a default system turn.
QWEN_LIKE = """{% set count = namespace(images=0) %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image_url' in part %}
                {%- set count.images = count.images + 1 %}
                {%- if add_vision_id %}{{ 'Picture ' ~ count.images ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- else %}
                {%- continue %}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
EXTRAS = """{{ bos_token }}{% for m in messages %}
  {% if m.role == 'fail' %}{{ raise_exception('role fail is unknown') }}{% endif %}
  {% generation %}{{ m | tojson }}{% endgeneration %}
  {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ eos_token }}{{ strftime_now('%Y') }}{{ messages[0] | tojson(indent=2) }}"""

IMAGE_PART = {"type": "image"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "what is at b1 ?"}]}],
    [{"role": "user", "content": [IMAGE_PART, IMAGE_PART, {"type": "text", "text": "<same> & 'different' é ?"}]}],
    [
        {"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "what is at b1 ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "and c2 ?"}]},
    ],
]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE as in Qwen: one character may span several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>", "<|im_end|>", "<image>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Sentencepiece-like BPE as in Llama: a space marker, bytes for the unknown, a beginning token from the post-processor."""
    pieces = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghilnorstuw?", "is", "▁is", "▁▁"]
    merges = [("i", "s"), ("▁", "is"), ("▁", "▁")]
    model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    """A checkpoint's tokenizer files; cut and pad, as some of them ask, must not touch a prompt."""
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "add_bos_token": True, **config})
    )
    return folder


@pytest.fixture(params=["byte-level", "byte-fallback", "tiny-llava"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tiny-llava":
        return TINY
    return save(byte_level() if request.param == "byte-level" else byte_fallback(), tmp_path)


def reference(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_ids_and_text_equal_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), reference(folder)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos_id == theirs.eos_token_id


def test_the_beginning_token_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(byte_fallback(), tmp_path))
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.encode("<s>a").count(1) == 1
    assert tokenizer.encode("<s>a", add_special_tokens=True).count(1) == 2


def test_streamed_pieces_make_the_whole_text_and_break_no_character(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=True)
        stream = tokenizer.stream()
        pieces = [stream.push(index) for index in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_streams_of_random_tokens_make_the_same_text(folder: Path) -> None:
    """Also of broken bytes, special tokens in the middle, and runs of space markers."""
    tokenizer = Tokenizer(folder)
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    # A byte-fallback decoder gives up on a whole run of bytes where one is broken, characters shown long ago included: whole ones only.
    units = [[index] for token, index in vocabulary.items() if not token.startswith("<0x")]
    if "<0x00>" in vocabulary:
        units += [[vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()] for character in "é東🙂½" * 5]
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = [index for choice in rng.integers(0, len(units), 12) for index in units[choice]]
        stream = tokenizer.stream()
        assert "".join(stream.push(index) for index in ids) + stream.finish() == tokenizer.decode(ids)


def test_an_unfinished_character_waits_then_shows_as_broken(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(byte_fallback(), tmp_path))
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    stream = tokenizer.stream()
    assert [stream.push(int(index or 0)) for index in ids] == ["", "", "", "🙂"]
    assert stream.push(int(ids[0] or 0)) == "" and stream.finish() == "\ufffd"
    stream.push(int(ids[0] or 0))
    assert stream.push(tokenizer.encode("is")[-1]) == "\ufffd is"


def test_the_window_of_a_stream_stays_short(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(byte_level(), tmp_path))
    stream = tokenizer.stream()
    for index in [*tokenizer.encode("what is at b1 ? " * 200), *tokenizer.encode("</s>" * 50)]:
        stream.push(index)
        assert len(stream._window) <= 8


def test_special_tokens_of_old_files(tmp_path: Path) -> None:
    save(
        byte_level(),
        tmp_path,
        eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        additional_special_tokens=["café"],
    )
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "</s>"}, "unk_token": "<s>"}))
    ours, theirs = Tokenizer(tmp_path), reference(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map
    ids = ours.encode("a café</s>")
    assert ids == theirs("a café</s>")["input_ids"] and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a "


def test_tokenizer_faults(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path)
    save(byte_level(), tmp_path)
    with pytest.raises(RuntimeInputError, match="position 1"):
        Tokenizer(tmp_path).encode("a\ud800")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_tiny_llava_template_equals_the_processor(chat: list[dict[str, Any]], generate: bool) -> None:
    processor = transformers.AutoProcessor.from_pretrained(TINY)
    tokenizer = Tokenizer(TINY)
    template = ChatTemplate.from_folder(TINY, tokenizer.special_tokens)
    assert template is not None and template.takes_parts
    theirs = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
    assert template.render(chat, generate) == theirs
    assert tokenizer.encode(theirs) == processor.tokenizer(theirs, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("source", [QWEN_LIKE, EXTRAS], ids=["qwen-like", "extras"])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("chat", [*CHATS, [{"role": "system", "content": "plain"}, {"role": "user", "content": "text <only>"}]])
def test_templates_render_as_transformers(source: str, chat: list[dict[str, Any]], generate: bool, tmp_path: Path) -> None:
    theirs = reference(save(byte_level(), tmp_path))
    ours = ChatTemplate(source, Tokenizer(tmp_path).special_tokens).render(chat, generate)
    assert ours == theirs.apply_chat_template(chat, chat_template=source, tokenize=False, add_generation_prompt=generate)


def test_templates_are_found_where_the_processors_look(tmp_path: Path) -> None:
    def rendered(name: str = "default") -> str | None:
        template = ChatTemplate.from_folder(tmp_path, {}, name)
        return None if template is None else template.render([])

    assert rendered() is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from the tokenizer"}))
    assert rendered() == "from the tokenizer"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]}))
    assert (rendered(), rendered("tool_use")) == ("one", "two")
    with pytest.raises(BundleError, match="'rag' .* choose one of default, tool_use"):
        rendered("rag")
    (tmp_path / "chat_template.jinja").write_text("from the file\n")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("another file")
    assert (rendered(), rendered("rag")) == ("from the file", "another file")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from the old file"}))
    assert rendered() == "from the old file"
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "from the processor"}))
    assert rendered() == "from the processor"


def test_faults_of_templates_and_messages() -> None:
    with pytest.raises(BundleError, match="not valid"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(RuntimeInputError, match="role fail is unknown"):
        ChatTemplate(EXTRAS, {}).render([{"role": "fail", "content": "x"}])
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__.os }}"):
        with pytest.raises(RuntimeInputError, match="refuses"):
            ChatTemplate(attack, {}).render([])
    assert ChatTemplate("{{ messages[0].image }}", {}).render([{"image": Path("x")}]) == f"<{type(Path('x')).__name__}>"


def test_message_takes_the_form_that_the_template_reads() -> None:
    plain = ChatTemplate("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", {})
    assert not plain.takes_parts
    assert plain.render([plain.message("user", "hello", 1)]) == "user: <image>\nhello"
    printed = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert not printed.takes_parts and printed.render([printed.message("user", "hello")]) == "hello"
    parts = ChatTemplate(QWEN_LIKE, {})
    assert parts.takes_parts
    assert parts.render([parts.message("user", "hello", 2)]).count("<|image_pad|>") == 2


def test_expansion_of_placeholders() -> None:
    ids, group = expand_image_tokens([1, 4, 8, 4, 4, 9], 4, [2, 3, 1])
    assert ids.tolist() == [1, 4, 4, 8, 4, 4, 4, 4, 9] and ids.dtype == np.int64
    assert group.tolist() == [0, 1, 1, 0, 2, 2, 2, 3, 0] and group.dtype == np.int32
    ids, group = expand_image_tokens([5, 6], 4, [])
    assert ids.tolist() == [5, 6] and group.tolist() == [0, 0]
    assert [part.shape for part in expand_image_tokens([], 4, [])] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([1, 4, 4], [2], r"2 image placeholder\(s\) for 1 picture\(s\); give a picture for each"),
        ([1, 2], [2, 2], r"0 image placeholder\(s\) for 2 picture\(s\); write one placeholder per picture"),
        ([4], [0], r"are \[0\]"),
    ],
)
def test_numbers_that_differ_are_both_named(ids: list[int], counts: list[int], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        expand_image_tokens(ids, 4, counts)


def test_plain_prompts_get_their_placeholders_in_front() -> None:
    assert place_images("what?", 1, "<image>") == "<image>\nwhat?"
    assert place_images("what?", 0, "<image>") == "what?"
    assert place_images("see <image> here", 1, "<image>") == "see <image> here"
    qwen = place_images("what?", 2, "<|image_pad|>", before="<|vision_start|>", after="<|vision_end|>")
    assert qwen == "<|vision_start|><|image_pad|><|vision_end|>" * 2 + "what?"


def test_expanded_prompt_equals_the_processors_ids() -> None:
    processor = transformers.AutoProcessor.from_pretrained(TINY)
    tokenizer = Tokenizer(TINY)
    template = ChatTemplate.from_folder(TINY, tokenizer.special_tokens)
    assert template is not None
    text = template.render([template.message("user", "what is at b1 ?", 2)])
    pictures = [np.full((40, 30, 3), 9, dtype=np.uint8)] * 2
    theirs = processor(text=text, images=pictures, add_special_tokens=False)["input_ids"][0]
    ids, group = expand_image_tokens(tokenizer.encode(text), 4, [196, 196])
    assert ids.tolist() == list(theirs)
    assert [int((group == index).sum()) for index in (1, 2)] == [196, 196]
    assert np.array_equal(group > 0, ids == 4)
