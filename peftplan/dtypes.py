"""The dtypes of stored numbers: our short names, torch's names, and bytes per element."""

from __future__ import annotations

from peftplan.errors import UnknownNameError

ITEMSIZE: dict[str, int] = {
    "fp64": 8,
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element of each dtype that a tensor on the device can have."""

ALIASES: dict[str, str] = {
    "float64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "fp8": "fp8_e4m3",
}
"""torch's own names for the same dtypes."""

MODEL_DTYPES = ("bf16", "fp16", "fp32")
"""The dtypes that a model can be loaded and trained in (`--dtype`)."""
OF_CHECKPOINT = "auto"
"""Likewise: the dtype in which the checkpoint is stored."""
AS_LOADED = "unstated"
"""What `from_pretrained` gives a model where a program states no dtype: it depends on the release of transformers."""
SIXTEEN_BITS = ("bf16", "fp16")


def parse_dtype(value: object, *, field: str = "dtype", accepted: tuple[str, ...] = tuple(ITEMSIZE)) -> str:
    """Return our short name for a dtype given as `bf16`, `bfloat16`, `torch.bfloat16` or a `torch.dtype`.

    Raises UnknownNameError where the dtype is unknown or not among `accepted`.
    """
    if isinstance(value, str) and value in accepted:
        return value
    is_dtype = type(value).__module__.partition(".")[0] in ("torch", "numpy")
    name = str(value).removeprefix("torch.").lower() if isinstance(value, str) or is_dtype else ""
    short = ALIASES.get(name, name)
    if short not in accepted:
        raise UnknownNameError(field, value, accepted)
    return short
