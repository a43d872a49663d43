"""The tensors that the installed peft saves for any of its methods: `get_peft_model_state_dict` of a model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from peftplan.deployment.safetensors import StoredTensor
from peftplan.dtypes import parse_dtype
from peftplan.errors import PeftplanError, RefusedError
from peftplan.libraries.count import _config_object, on_meta
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers

BASE, ADAPTER = "bf16", "fp32"
"""On meta the base is in bf16 and peft's own parameters are in fp32 (`autocast_adapter_dtype`): that tells whose one is."""


def saved_tensors(
    config: Mapping[str, Any], peft_config: Mapping[str, Any], *, task_type: str | None, dtype: str, adapter_dtype: str
) -> tuple[StoredTensor, ...]:
    """The tensors of the adapter's file, those of the base in `dtype`, peft's own in `adapter_dtype`.

    Raises MissingExtraError without torch, transformers or peft, RefusedError if peft refuses or needs values.
    """
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        cls = model_class(config, hf_config, name="model", task_type=task_type)
        model = build_model(config, hf_config, cls, name="model")
        import peft
        import torch

        try:
            adapted = on_meta(model, _config_object(peft_config, task_type))
            with patch.object(
                torch.Tensor, "cpu", lambda tensor: tensor
            ):  # a prompt is saved from the CPU, where meta has no values
                state = peft.get_peft_model_state_dict(adapted)
        except PeftplanError:
            raise
        except Exception as error:  # peft raises whatever its code meets
            reason = str(error).strip().split("\n", 1)[0]
            raise RefusedError(
                f"peft {peft.__version__} fails when it lists what it saves: {type(error).__name__}: {reason}"
            ) from None
    dtype_of = {BASE: dtype, ADAPTER: adapter_dtype}
    tensors = ((name, parse_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items())
    return tuple(StoredTensor(name, dtype_of.get(kind, kind), shape) for name, kind, shape in tensors)
