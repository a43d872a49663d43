"""A tokenizer and a processor for a model that is known by its config alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

CHARACTERS = 4
"""The stand-in tokenizer makes one token of so many characters; a class that makes its own model of the vocabulary, of a byte."""
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}CONTENT"
    "{% endgeneration %}{% else %}CONTENT{% endif %}{% endfor %}"
)
CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}PICTURE{% endif %}{% endfor %}{% endif %}"
)
RESERVED = ("<|reserved_special_token_0|>", "<|endoftext|>")
"""Special tokens without a role: what is in need of one takes the first, and Qwen's tokenizers add the second where it lacks."""
OF_QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
"""Role → name of the tokens that mark pictures in Qwen's tokenizers, under which tools look for them."""
SPECIAL = re.compile(r"(\w+)_token_(?:id|index)")
"""Fields of a config that hold the number of a special token."""


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """How many tokens a model knows; where its config leaves that out, transformers' default for its kind."""
    size = (config.get("text_config") or config).get("vocab_size")
    if size is None and "model_type" in config:
        from transformers import AutoConfig

        kind = str(config["model_type"])
        rest = {name: value for name, value in config.items() if name != "model_type"}
        size = getattr(AutoConfig.for_model(kind, **rest).get_text_config(), "vocab_size", None)
    return int(size or 32000)


def special_tokens(config: Mapping[str, Any]) -> dict[str, int]:
    """Role → number of each special token that a config names."""
    text, size = config.get("text_config") or config, vocabulary_size(config)
    fields = {**{name: value for name, value in text.items() if value is not None}, **config}
    numbers = {match[1]: _first_id(value) for name, value in fields.items() if (match := SPECIAL.fullmatch(name))}
    special = {role: number for role, number in numbers.items() if isinstance(number, int) and 0 <= number < size}
    special.setdefault("eos", size - 1)
    special.setdefault("pad", special["eos"])
    return special


def tokenizer_files(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`tokenizer.json` and `tokenizer_config.json`: as many tokens as the model has, and its own special ids."""
    size = vocabulary_size(config)
    special = special_tokens(config)
    called = OF_QWEN if str(config.get("model_type")).startswith("qwen") else {}
    special_names = {number: called.get(role, f"<{role}>") for role, number in special.items()}
    names = dict(special_names)
    plain, *spare = (number for number in range(size - 1, max(-1, size - 9), -1) if number not in names)
    special_names |= dict(zip(spare, RESERVED, strict=False))
    names |= special_names
    usual = [number for number in range(size) if number not in names and number != plain]
    names |= {plain: "<unk>", **dict(zip(usual, _bytes(), strict=False))}
    vocabulary = {names.get(number, f"<{number}>"): number for number in range(size)}
    yield (
        "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": number,
                    "content": name,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for number, name in sorted(special_names.items())
            ],
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": f"[\\s\\S]{{1,{CHARACTERS}}}"},
                "behavior": "Isolated",
                "invert": False,
            },
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        },
    )
    tokens = {f"{role}_token": names[number] for role, number in special.items()}
    common = {name: tokens.pop(name) for name in ("bos_token", "eos_token", "pad_token") if name in tokens}
    template = {"chat_template": _chat(tokens)}
    yield (
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": tokens, **common, **template},
    )
    yield "chat_template.json", template


def _first_id(ids: Any) -> int | None:
    """A config may state several end tokens."""
    return next(iter(ids), None) if isinstance(ids, (list, tuple)) else ids


def _bytes() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, for classes that make their own model of it (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256)]


def _chat(tokens: Mapping[str, str]) -> str:
    """A chat template. A picture is the token that begins one, else its own between those that mark it."""
    marked = (tokens.get("vision_start_token", ""), tokens.get("image_token", ""), tokens.get("vision_end_token", ""))
    return CHAT.replace("CONTENT", CONTENT.replace("PICTURE", tokens.get("boi_token") or "".join(marked)))


def processor_files(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What says how pictures are prepared, for a model that sees: transformers' own classes, sizes of the model's vision part."""
    kind = str(config.get("model_type"))
    vision = config.get("vision_config") or (config if "patch_size" in config else _default_vision(kind))
    if not isinstance(vision, Mapping):
        return
    from transformers.models.auto import image_processing_auto, processing_auto, video_processing_auto

    names = {
        "image_processor_type": image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(kind),  # type: ignore[attr-defined]
        "video_processor_type": video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES.get(kind),  # type: ignore[attr-defined]
    }
    fields = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "spatial_merge_size": "merge_size"}
    sizes: dict[str, Any] = {theirs: vision[ours] for ours, theirs in fields.items() if isinstance(vision.get(ours), int)}
    if isinstance(vision.get("image_size"), int):
        sizes["size"] = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = {"processor_class": processing_auto.PROCESSOR_MAPPING_NAMES.get(kind)}  # type: ignore[attr-defined]
    slow_classes = {name: _slow(value) for name, value in names.items() if value}
    yield "preprocessor_config.json", {**slow_classes, **sizes, **processor}
    yield "video_preprocessor_config.json", {**slow_classes, **sizes, **processor}
    if isinstance(config.get("mm_tokens_per_image"), int):
        processor["image_seq_length"] = config["mm_tokens_per_image"]
    yield "processor_config.json", processor


def _default_vision(kind: str) -> Mapping[str, Any] | None:
    """The vision part that transformers gives a model of this type whose config has none, such as Ministral 3."""
    from transformers import CONFIG_MAPPING

    vision = CONFIG_MAPPING[kind]().to_dict().get("vision_config") if kind in CONFIG_MAPPING else None
    return vision if isinstance(vision, Mapping) else None


def _slow(value: Any) -> str:
    """The class of a processor, of which a release may name several by what they need."""
    names = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else (value,)
    return str(next(name for name in names if name))
