"""tiny-llava before training: vocabulary, processor, and a LLaVA with random weights."""

from typing import Any

from scenes import CELLS, COLOURS, SHAPES, SIDE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

__all__ = ["PATCH", "VISUAL_TOKENS", "build_model", "build_processor", "build_tokenizer"]

PATCH = 8
VISUAL_TOKENS = (SIDE // PATCH) ** 2
CONTEXT = 512
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")
SPOKEN = (
    "what",
    "is",
    "at",
    "?",
    "colour",
    "shape",
    "digit",
    "how",
    "many",
    "things",
    "are",
    "there",
    "a",
    "yes",
    "no",
    "nothing",
    "empty",
    "white",
    "row",
    ",",
)
NUMBERS = tuple(str(number) for number in range(17))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %} USER:{% else %} ASSISTANT:{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %} <image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] != 'user' %} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_tokenizer() -> Any:
    """One token a word, 74 in all; words are parted by spaces."""
    words = (*SPECIAL, *SPOKEN, *SHAPES.values(), "digits", "describe", *COLOURS, *SHAPES, *CELLS, *NUMBERS)
    level = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=level,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        model_max_length=CONTEXT,
    )
    tokenizer.padding_side = "left"
    return tokenizer


def build_processor(tokenizer: Any) -> Any:
    """Pictures to [-1, 1] at 112 px by PIL; `<image>` becomes 196 tokens."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" leaves out
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, width: int = 128, layers: int = 4, heads: int = 4) -> Any:
    """A LLaVA with random weights, tower and decoder of the same width and depth."""
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,  # the usual 0.02 leaves attention uniform for long at this width
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
