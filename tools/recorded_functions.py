"""Record what a mixer of a state space allocates, from the code of transformers on fake tensors.

    python -m tools.recorded_functions [NAME…]

A module runs between its projections, which return what they get, once for each variant of `VARIANTS`. Every size of its config
is a number of its own, so that each dim of what it allocates is a product of sizes that have names; those go into
`data/recorded_functions/` (`peftplan.memory.recorded_function` says how). Extra `trace`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import combinations_with_replacement, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from peftplan.depth.log import Moment
from peftplan.dtypes import ITEMSIZE
from peftplan.hardware.processors import A100
from peftplan.libraries.meta import quiet_transformers
from peftplan.trace.cuda.differences import cuda_autocast, kernel_temporaries
from peftplan.trace.engine import _as_on_card
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.fake import to_fake
from peftplan.trace.fake_mode import DenseMode

FOLDER = Path(__file__).parent.parent / "data" / "recorded_functions"
ON = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = {"one": 1, "several": 17}
TAPS = 4


class Recorded(NamedTuple):
    """A class of a modeling file, the sizes of a record that have names, and the config that has them."""

    module: str
    name: str
    sizes: Mapping[str, int]
    config: Callable[[Mapping[str, int]], dict[str, Any]]
    release: str = ""
    """The transformers of which it was recorded, of `NARROW` alone; empty: the one of all records."""


def _mamba2(groups: int, chunks: int = 5) -> dict[str, int]:
    """Sizes of Mamba 2: chunks c of l tokens, g groups of r heads, p numbers of a head, n of a state."""
    sizes = {"c": chunks, "l": 29, "g": groups, "r": 7, "p": 11, "n": 13}
    width, states = sizes["g"] * sizes["r"] * sizes["p"], sizes["g"] * sizes["n"]
    projected = 2 * width + 2 * states + sizes["g"] * sizes["r"]
    return sizes | {
        "x": width + 2 * states,
        "z": projected,
        "C": sizes["c"] + 1,
        "S": sizes["c"] * sizes["l"] + TAPS - 1,
        "k": TAPS,
    }


def _nemotron_h(s: Mapping[str, int]) -> dict[str, Any]:
    heads = s["g"] * s["r"]
    return {"hidden_size": 64, "num_hidden_layers": 1, "layers_block_type": ["linear_attention"], "mamba_num_heads": heads,
        "mamba_head_dim": s["p"], "n_groups": s["g"], "ssm_state_size": s["n"], "chunk_size": s["l"]}  # fmt: skip


def _falcon_h1(s: Mapping[str, int], *, normed: bool = False) -> dict[str, Any]:
    heads = s["g"] * s["r"]
    return {"hidden_size": 64, "num_hidden_layers": 1, "mamba_d_ssm": heads * s["p"], "mamba_n_heads": heads,
        "mamba_d_head": s["p"], "mamba_n_groups": s["g"], "mamba_d_state": s["n"], "mamba_chunk_size": s["l"],
        "mamba_rms_norm": normed}  # fmt: skip


def _granite(s: Mapping[str, int]) -> dict[str, Any]:
    heads = s["g"] * s["r"]
    return {"hidden_size": heads * s["p"] // 2 if heads * s["p"] % 2 == 0 else heads * s["p"], "num_hidden_layers": 1,
        "layer_types": ["linear_attention"], "layers_block_type": ["linear_attention"], "num_attention_heads": 1,
        "num_key_value_heads": 1, "mamba_expand": 1, "mamba_n_heads": heads, "mamba_d_head": s["p"],
        "mamba_n_groups": s["g"], "mamba_d_state": s["n"], "mamba_chunk_size": s["l"]}  # fmt: skip


FUNCTIONS = {
    "nemotron_h": Recorded("nemotron_h", "NemotronHMamba2Mixer", _mamba2(3), _nemotron_h),
    "nemotron_h-one-chunk": Recorded("nemotron_h", "NemotronHMamba2Mixer", _mamba2(3, chunks=1), _nemotron_h),
    "nemotron_h-1": Recorded("nemotron_h", "NemotronHMamba2Mixer", _mamba2(1), _nemotron_h),
    "falcon_h1": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(3), _falcon_h1),
    "falcon_h1-1": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(1), _falcon_h1),
    "falcon_h1-normed": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(3), partial(_falcon_h1, normed=True)),
    "falcon_h1-1-normed": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(1), partial(_falcon_h1, normed=True)),
    "falcon_h1-1-5.16": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(1), _falcon_h1, "5.16"),
    "falcon_h1-1-normed-5.16": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(1), partial(_falcon_h1, normed=True), "5.16"),
    "falcon_h1-normed-5.16": Recorded("falcon_h1", "FalconH1Mixer", _mamba2(3), partial(_falcon_h1, normed=True), "5.16"),
    "granitemoehybrid-1": Recorded("granitemoehybrid", "GraniteMoeHybridMambaLayer", _mamba2(1), _granite),
}


def _copied(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What a depthwise convolution copies: operands that are not contiguous (torch, Convolution.cpp, `_convolution`)."""
    return [x.new_empty(x.shape) for x in tensors if not x.is_contiguous()]


TEMPORARIES = {
    **kernel_temporaries(A100),
    torch.ops.aten.convolution.default: lambda x, *_: _copied(x),
    torch.ops.aten.convolution_backward.default: lambda grad, x, *_: _copied(grad, x),
}


class Variant(NamedTuple):
    """What decides the record beside sizes: dtypes of hidden states, of their projection and of weights, autocast, whether
    weights train, and the rows."""

    dtype: str
    projected: str
    weights: str
    autocast: str
    trains: bool
    rows: str

    def __str__(self) -> str:
        return "/".join(
            (self.dtype, self.projected, self.weights, self.autocast, "trains" if self.trains else "frozen", self.rows)
        )


DTYPES_OF_RUNS = (
    ("bf16", "bf16", "bf16", "none"), ("fp32", "fp32", "fp32", "none"), ("bf16", "bf16", "bf16", "bf16"),
    ("fp32", "bf16", "fp32", "bf16"), ("fp32", "fp32", "fp32", "bf16"),
    ("fp32", "fp32", "bf16", "bf16"),
)  # fmt: skip
VARIANTS = [Variant(*dtypes, trains, rows) for dtypes, trains, rows in product(DTYPES_OF_RUNS, (False, True), ROWS)]
VARIANTS = [v for v in VARIANTS if not (v.trains and v.projected == v.dtype != v.autocast != "none")]
"""Only a quantized layer, beside which no mixer trains, gives its input's dtype under autocast."""
NARROW = Variant("bf16", "bf16", "fp32", "bf16", trains=False, rows="one")
"""Falcon-H1 as axolotl casts its prepared base: weights at rest in fp32, but for a norm and the buffer."""


class _Entered(torch.autograd.Function):
    """Stands for the projection before: tells which tensor its gradient is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, told: Callable[[torch.Tensor], None], like: Callable[[], torch.Tensor]) -> Any:
        ctx.told = told
        return like()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.told(grad)
        return None, None, None


class _Left(torch.autograd.Function):
    """Stands for the projection behind: its backward makes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, like: Callable[[], torch.Tensor]) -> Any:
        ctx.like = like
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.like(), None


class _Projection(nn.Module):
    """Stands for a projection of the module."""

    weight = bias = None

    def __init__(self, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(x)


def record(of: Recorded, variant: Variant) -> dict[str, Any]:
    """The record of one variant."""
    with quiet_transformers():
        modeling = import_module(f"transformers.models.{of.module}.modeling_{of.module}")
        from transformers import AutoConfig

        config = AutoConfig.for_model(of.module, **of.config(of.sizes))
        with torch.device("meta"):
            mixer = getattr(modeling, of.name)(config, 0)
    mixer.train().to(DTYPES[variant.weights])  # but for tables that are multiplied with the input
    mixer.requires_grad_(variant.trains)
    mode = DenseMode(allow_non_fake_inputs=True)
    tracker = Tracker(is_logits=lambda x: False, scalar=lambda x: 1, temporaries=TEMPORARIES, after=lambda *a: None)
    tracker.known, tracker.below = mode.known, 1
    b, s, z = ROWS[variant.rows], of.sizes["c"] * of.sizes["l"], of.sizes["z"]
    hidden = config.hidden_size
    marks: dict[str, int] = {}
    told: list[int] = []
    leaf = torch.zeros((), requires_grad=True)

    def number_of(x: torch.Tensor) -> int:
        return tracker._live[x.untyped_storage()._cdata].record.id

    def projected(x: torch.Tensor) -> torch.Tensor:
        like = partial(torch.empty, (b, s, z), dtype=DTYPES[variant.projected])
        x = _Entered.apply(leaf, lambda grad: told.append(number_of(grad)), like)  # type: ignore[no-untyped-call]
        marks.update(began=len(tracker.log), x=number_of(x))
        return x

    def mixed(x: torch.Tensor) -> torch.Tensor:
        marks.update(mixed=len(tracker.log))
        return x

    if of.module == "falcon_h1":
        narrow = DTYPES[variant.dtype if variant == NARROW else variant.weights]
        mixer.register_buffer("mup_vector", torch.empty((1, 1, z), dtype=narrow, device="meta"))
        if mixer.mamba_rms_norm:
            mixer.norm.to(narrow)
    mixer.in_proj, mixer.out_proj = _Projection(projected), _Projection(mixed)
    to_fake(mixer, mode, lambda module: ON)
    out: dict[str, Any] = {}
    with _as_on_card(mode, (8, 0), A100, device="cpu"), tracker:
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            tracker.register(tensor, "weights", "")
        for kind in ("checkpointed", "training"):
            dropped = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)
            with cuda_autocast(None if variant.autocast == "none" else DTYPES[variant.autocast], "cpu"):
                with dropped if kind == "checkpointed" else nullcontext():
                    y = mixer(torch.empty((b, s, hidden), dtype=DTYPES[variant.dtype]))
                parts = tracker.log[marks["began"] : marks["mixed"]], tracker.log[marks["mixed"] :]
                out[kind] = (*parts, number_of(y), marks["x"])
                loss = _Left.apply(y, partial(torch.empty, y.shape, dtype=y.dtype))  # type: ignore[no-untyped-call]
                del y
            if kind == "training":
                tracker.begin("backward")
                before = len(tracker.log)
                loss.backward()
                grads = {name: number_of(p.grad) for name, p in mixer.named_parameters() if p.grad is not None}
                out["backward"] = (tracker.log[before:], told[0], grads)
            del loss
    return out


def words(log: Iterable[Moment], sizes: Mapping[str, int], numbers: dict[int, int], outer: Mapping[int, str]) -> Iterator[str]:
    """A log's events: `4bclgrp` of numbers of 4 bytes, as many as the product of these sizes, and `-3` the end of the third."""
    for moment in log:
        storage = moment.storage
        if moment.kind == "free":
            if storage.id in outer or storage.id in numbers:
                yield f"-{outer.get(storage.id) or numbers[storage.id]}"
        elif storage.id not in outer and storage.shape:
            numbers[storage.id] = len(numbers) + 1
            yield f"{ITEMSIZE[storage.dtype]}{''.join(_letters(dim, sizes) for dim in storage.shape if dim != 1)}"


def _letters(dim: int, sizes: Mapping[str, int]) -> str:
    """The letters of the sizes whose product a dim is."""
    for count in range(1, 6):
        for letters in combinations_with_replacement(sizes, count):
            if prod(sizes[letter] for letter in letters) == dim:
                return "".join(letters)
    raise ValueError(f"{dim} is no product of {dict(sizes)}")


def text_of(of: Recorded, variant: Variant) -> dict[str, Any]:
    """The record of a variant, in words."""
    logs = record(of, variant)
    sizes = {**of.sizes, "b": ROWS[variant.rows]}
    sizes = {letter: size for letter, size in sizes.items() if size > 1}
    result: dict[str, Any] = {}
    numbers: dict[int, int] = {}
    for kind in ("checkpointed", "training"):
        *parts, out, x = logs[kind]
        numbers.clear()
        before, after = (list(words(part, sizes, numbers, {x: "x"})) for part in parts)
        result[kind] = " ".join((*before, "!", *after))
        result[f"{kind}_output"] = numbers[out]
    log, to_x, grads = logs["backward"]
    g = next(moment.storage.id for moment in log if moment.storage.shape)
    result["backward"] = " ".join(
        word for word in words(log, sizes, numbers, {x: "x", g: "g"}) if word != f"-{numbers.get(to_x)}"
    )
    result["to_input"] = numbers[to_x]
    if grads:
        result["gradients"] = {name: numbers[number] for name, number in grads.items()}
    return result


def main() -> None:
    """Write the records."""
    for name in sys.argv[1:] or [name for name, of in FUNCTIONS.items() if not of.release]:
        of = FUNCTIONS[name]
        if not transformers.__version__.startswith(of.release):
            raise SystemExit(f"{name} is recorded of transformers {of.release}")
        kinds = [*([] if of.release else VARIANTS), *([NARROW] if of.module == "falcon_h1" else [])]
        variants = {str(variant): text_of(of, variant) for variant in kinds}
        (FOLDER / f"{name}.json").write_text(json.dumps(variants, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
