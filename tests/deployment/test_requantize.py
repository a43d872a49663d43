"""Merging LoRA into weights of bitsandbytes: peft's own merge on the CPU, where a patched `.to` keeps host and device apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

import peftplan  # noqa: E402
from tests.deployment.merges import Storages  # noqa: E402
from tests.deployment.test_merging import CONFIG  # noqa: E402

TO = torch.Tensor.to
BESIDE = ("absmax", "code", "offset")


def quantized(quant: str, *, double_quant: bool, dora: bool) -> Any:
    """A Llama in bf16 whose down projections are stored, with LoRA on them."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(torch.bfloat16)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.data
        out, width = weight.shape
        if quant == "int8":
            linear = bnb.nn.Linear8bitLt(width, out, bias=False, has_fp16_weights=False, threshold=6.0)
            linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            linear = bnb.nn.Linear4bit(width, out, bias=False, compress_statistics=double_quant, quant_type=quant)
            linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double_quant, quant_type=quant)
        layer.mlp.down_proj = linear.to("cpu")
    setattr(model, "is_loaded_in_8bit" if quant == "int8" else "is_loaded_in_4bit", True)
    config = peft.LoraConfig(target_modules=["down_proj"], r=4, use_dora=dora)
    return peft.get_peft_model(model, config).eval().requires_grad_(False)


def beside(model: Any) -> Iterator[torch.Tensor]:
    """The tensors that quantized weights keep beside themselves."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        for state in (getattr(weight, "quant_state", None), getattr(getattr(weight, "quant_state", None), "state2", None)):
            yield from (t for name in BESIDE if isinstance(t := getattr(state, name, None), torch.Tensor))
        yield from (t for name in ("CB", "SCB") if isinstance(t := getattr(weight, name, None), torch.Tensor))


@contextmanager
def host_apart(seen: Storages) -> Iterator[None]:
    """`.to("cpu")` makes a copy that is not counted; what lies there is copied again, counted, when it moves to a device."""
    host: set[int] = set()

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        where = kwargs.get("device", args[0] if args else None)
        if where == "cpu":
            copy = TO(self.clone())
            key = copy.untyped_storage()._cdata
            seen.now -= seen.known[key]
            seen.known[key] = 0
            host.add(key)
            return copy
        if isinstance(where, torch.device) and self.untyped_storage()._cdata in host:
            dtype = kwargs.get("dtype", self.dtype)
            return self.clone() if dtype == self.dtype else TO(self, dtype)
        return TO(self, *args, **kwargs)

    with patch.object(torch.Tensor, "to", to):
        yield


CASES = [(quant, double, dora) for quant, double in (("nf4", False), ("nf4", True), ("fp4", False)) for dora in (False, True)]
CASES += [("int8", False, True)]
"""LoRA into int8 peaks while it is quantized, which takes more temporaries on the CPU than the kernel of a GPU does."""


@pytest.mark.parametrize(("quant", "double_quant", "dora"), CASES)
def test_a_merge_into_stored_weights(quant: str, double_quant: bool, dora: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantized(quant, double_quant=double_quant, dora=dora)
        with Storages(model) as seen:
            for tensor in beside(model):
                seen.meet(tensor)
            start = seen.peak = seen.now
            with host_apart(seen):
                model.merge_and_unload()
    options = {"double_quant": double_quant} if quant != "int8" else {}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **CONFIG}
    serving = peftplan.serving(
        config, method="dora" if dora else "lora", target_modules=["down_proj"], r=4, quant=quant, **options
    )
    need = next(merge.need for merge in serving.merges if merge.place == "gpu_quantized")
    assert need.module.endswith("down_proj.weight")
    assert 0 <= need.num_bytes - (seen.peak - start) < 4 * 512, "each tensor rounded up to 512"
