"""LoRA and DoRA (peft, tuners/lora/layer.py `Linear.forward`, bnb.py `Linear4bit.forward`, dora.py)."""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.parts import Part, Running
from peftplan.methods.lora import LoraConfig
from peftplan.storage.config import FOUR_BIT
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def lora(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`result + lora_B(lora_A(dropout(x))) * scaling`, with x in the adapter's dtype: each module copies it.

    On a 4-bit base the result is cloned first, and x is cast only without autocast. gptq's layer is as one without quantization
    (peft, tuners/lora/gptq.py).
    """
    result = base(x)
    a, b = part.params["lora_A.weight"], part.params["lora_B.weight"]
    dtype = result.dtype
    if part.quant is not None and part.quant.layout in FOUR_BIT:
        result = ops.copied(f, result, "clone", viewed=False)
    dense = part.quant is None or part.quant.layout == "gptq"
    converts = dense or running.autocast is None
    shards = running.adapter_shards
    if converts:
        if f.modules is not None and f.modules.read(part.name, part.layer, a):
            shards = None
        x = f.to(x, shards or a.dtype)
    config = running.config_as(LoraConfig)
    if config.use_dora:
        from peftplan.memory.methods.dora import dora, dora_of_torchtune

        result = (dora_of_torchtune if running.own_modules else dora)(f, part, x, result, running)
        return f.to(result, dtype) if converts else result
    bias = part.params.get("lora_B.bias")
    f.module = f"{part.name}.lora_A"
    dropped = f.call(f"{part.name}.lora_dropout", part.layer, (), x, lambda x: ops.dropout(f, x, config.lora_dropout))
    if converts and shards:
        dropped = f.to(dropped, a.dtype)  # as the unit casts what it is called with
    low = f.call(f"{part.name}.lora_A", part.layer, (a,), dropped, lambda x: products.linear(f, x, a))
    del dropped  # an argument of the module
    f.module = f"{part.name}.lora_B"
    out = f.call(f"{part.name}.lora_B", part.layer, (b, bias), low, lambda x: products.linear(f, x, b, bias))
    del low
    f.module = part.name
    out = ops.scale(f, out)
    if not dense and converts:
        out = f.to(out, dtype)
    result = ops.add(f, result, out)
    del out
    return f.to(result, dtype) if dense else result
