"""Values for options and fields: valid, nearly valid, absurd."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

from peftplan.arch import catalogue
from peftplan.arch.heads import TASK_TYPES
from peftplan.hardware.gpus import gpus
from peftplan.job.setup import Setup
from peftplan.job.trainers import TRAINERS
from peftplan.methods import METHODS, OTHER_PEFT_TYPES, config_class
from peftplan.optim.names import OPTIMIZERS
from peftplan.storage import FORMATS

DTYPES = ("bf16", "fp16", "fp32", "float32", "torch.bfloat16", "fp8", "int8")
TARGETS = ("all-linear", "attention", "mlp", "peft-default", "q_proj,v_proj", "c_attn", ".*proj", "query,value", "lm_head")
MODELS = tuple(entry.name for entry in catalogue.models())
VALID: dict[str, Sequence[str]] = {
    "method": (*METHODS, *METHODS, *(other.lower() for other in OTHER_PEFT_TYPES[:4])),
    "target_modules": TARGETS,
    "pattern": TARGETS,
    "exclude_modules": ("lm_head", "q_proj", r".*\.0\..*"),
    "modules_to_save": ("lm_head", "embed_tokens", "wte"),
    "layers_to_transform": ("0", "0,1", "3"),
    "rank_pattern": ('{"q_proj": 4}', '{".*v": 1}', "{}"),
    "bias": ("none", "all", "lora_only"),
    "set": (
        "r=4",
        "lora_bias=true",
        "use_dora=1",
        "init_lora_weights=eva",
        "rank_pattern={}",
        "num_virtual_tokens=3",
        "lora_alpha=1",
    ),
    "task_type": tuple(TASK_TYPES),
    "num_labels": ("1", "3", "1000"),
    "lora_dropout": ("0", "0.1", "0.5"),
    "quant": ("none", *FORMATS),
    "quant_bits": ("2", "4", "8"),
    "quant_blocksize": ("64", "128"),
    "trainer": tuple(TRAINERS),
    "optim": tuple(OPTIMIZERS),
    "optim_args": ("rank=8", "rank=4,update_proj_gap=10"),
    "autocast": ("none", "bf16", "fp16"),
    "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "loss": ("auto", "full", "trl-chunked", "liger", "unsloth"),
    "torch": ("2.6", "2.10.0", "2.13"),
    "transformers": ("4.40", "5.3", "5.24.0"),
    "gpus": (*(gpu.id for gpu in gpus()[:60]), "24GiB", "80GB", "t4,l4"),
    "fmt": ("json", "json", "csv", "markdown", "table"),
    "engine": ("analytic",),
    "capacity": ("24GiB", "rtx-4090", "1MiB"),
    "device_memory": ("24GiB", "h100-80gb"),
    "alloc_conf": ("expandable_segments:True", "max_split_size_mb:64", "roundup_power2_divisions:[256:1,>:2]", "backend:native"),
    "sample": ("1", "2"),
    "name": tuple(METHODS),
    "context": ("1", "2048"),
}
"""By the name of an option's parameter or of a field; for the others, a number or a word."""
USUAL = ("1", "2", "8", "64", "1024", "0.5", "true", "q_proj")
NUMBERS = ("1", "2", "8", "64", "1024")
COUNTS = ("adapters", "context", "encoder_context", "device", "seed", "steps", "warmup", "timeout")

ABSURD = (
    "", " ", "0", "-1", "-0", "1.5", "1e5", "1e30", "1e999", "-1e999", "nan", "inf", "-inf", "0x10", "1_000", " 7 ", "٣", "½",
    "²", str(2**31), str(2**31 + 1), str(2**63), str(10**30), "-" + "9" * 40, "9" * 400, "9" * 5000, "0." + "0" * 500 + "1",
    "None", "null", "true", "{}", "[]", "{", "[", "[1", '{"a"', "NaN", '{"q": NaN}', '{"(": 1}', "[" * 5000, '{"a":' * 5000,
    "(" * 300, "(", ")", "*", "a{99999999999}", "(?P<x", "\\", "[a-", "(?i)Q", "a,b", ",", ",,", "=", "a=", "=a", "a=b=c",
    "-", "--", "--r",
    "@file", "é", "日本語", "\u202e\u2066", "\ud800", "\udcff", "\x00", "\x1b[31m", "\x07\x08", "a\nb", "a\r\nb", "\t",
    "\u2028", "\ufeff",
    "😀" * 50, "a" * 300, "x" * 5000, "x" * 100_000, "../../../etc/passwd", "/dev", ".", "..", "~", "~nobody-here", "/dev/null",
    "CON", "a/b",
    "a/b/c",     "%s%n", "{0}", "{x}", "${HOME}", "$(true)", "=1+1", "|", "<b>", "[x](y)", "`", "\\|",
)  # fmt: skip


def near(dice: Random, text: str) -> str:
    """A valid value with a letter more, less, or changed."""
    letters = list(text)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(letters) + 1)
        letters[at : at + dice.randint(0, 1)] = dice.choice(["", "x", "_", "-", "0", "9", ".", ",", " ", "é", "\x1b", text[:3]])
    return "".join(letters)


def text_for(dice: Random, name: str) -> str:
    """A text for an option of that name."""
    pool = VALID.get(name) or (DTYPES if name.endswith("dtype") else MODELS if name == "model" else _usual(name))
    chance = dice.random()
    if chance < 0.86:
        return dice.choice(pool)
    return near(dice, dice.choice(pool)) if chance < 0.92 else dice.choice(ABSURD)


def _usual(name: str) -> Sequence[str]:
    """Numbers where a field is a number, else words too."""
    fields = {**Setup.model_fields, **config_class(METHODS["lora"]).model_fields}
    return NUMBERS if name in COUNTS or (name in fields and "int" in str(fields[name].annotation)) else USUAL


def model_text(dice: Random) -> str:
    """A model: built in, nearly so, or absurd."""
    return text_for(dice, "model")


class Odd:
    """An object of the user's with methods that break."""

    def __repr__(self) -> str:
        raise ValueError("no repr")

    def to_dict(self) -> Any:
        return [1]


class Talkative:
    """An object whose repr is long and has many lines."""

    model_type = "llama"

    def __repr__(self) -> str:
        return "line\n\x1b" * 10_000

    def to_dict(self) -> Any:
        return {"model_type": "llama", self: self}


def nest(levels: int) -> Any:
    """Lists whose text would have 2^levels letters."""
    inner: Any = "x"
    for _ in range(levels):
        inner = [inner, inner]
    return inner


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    inner: Any = []
    for _ in range(levels):
        inner = [inner]
    return inner


def json_value(dice: Random, *, levels: int = 3) -> Any:
    """Any JSON value."""
    kind = dice.randrange(9 if levels else 7)
    if kind < 2:
        return dice.choice(ABSURD)
    if kind < 4:
        return dice.choice([0, 1, -1, 2, 7, 64, 2**12, 2**24, 2**31, 2**63, 10**30, 10**400, -(10**30)])
    if kind < 5:
        return dice.choice([0.5, -0.5, 1e308, 1e-308, float("inf"), float("-inf"), float("nan")])
    if kind < 7:
        return dice.choice([None, True, False, "", [], {}])
    if kind == 7:
        return [json_value(dice, levels=levels - 1) for _ in range(dice.randint(0, 4))]
    return {dice.choice(ABSURD[:30] + USUAL): json_value(dice, levels=levels - 1) for _ in range(dice.randint(0, 3))}


def odd_object(dice: Random) -> Any:
    """Something that no option takes, or that only looks like it."""
    choices: list[Any] = [
        Odd(), Odd, Talkative(), Talkative, object(), print, lambda: 1, b"bytes", bytearray(b"x"), {1, 2}, frozenset("a"),
        range(3), iter([1]), (x for x in "ab"), 1j, Decimal("NaN"), Decimal(3), Fraction(1, 3), Path("gpt2"), Path("\0"),
        Ellipsis,
        NotImplemented, nest(40), deep(3000), {"a": nest(40)}, {None: 1}, {1: 2}, {(): ()}, type, Exception("x"), 10**5000,
        -(10**5000), 1.0,
        True, (), (1,),
    ]  # fmt: skip
    return dice.choice([*choices, json_value(dice)])


def field_value(dice: Random, name: str) -> Any:
    """A value for a Python keyword: most fit."""
    chance = dice.random()
    if chance < 0.75:
        text = text_for(dice, name)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return json_value(dice) if chance < 0.87 else odd_object(dice)


def fields_of(method: object) -> list[str]:
    """Names of the fields of the setup and of a method; of LoRA where it is none."""
    known = METHODS.get(method) if isinstance(method, str) else None
    return sorted({*Setup.model_fields, *config_class(known or METHODS["lora"]).model_fields})
