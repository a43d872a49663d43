"""What peft computes on values while it creates an adapter (a clustering, a decomposition, a permutation), without values.

A stand-in gives tensors of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftplan.libraries.replacing import replaced


@contextmanager
def stand_ins(peft_type: str) -> Iterator[None]:
    """Replace what a method computes on values by empty tensors of the same shapes, while its adapter is created."""
    with replaced(STAND_INS.get(peft_type, {})):
        yield


def _butterfly(layer: Any, n: int, b: int, r: int = 3, n_butterfly_factor: int = 1) -> Any:
    """The indices of a butterfly permutation in any order: peft's depends on values."""
    import torch

    if n_butterfly_factor and b * r * 2 > n:
        raise ValueError("Invalid number of blocks!")
    return torch.arange(n)


def _permutation(layer: Any, indices: Any) -> Any:
    import torch

    return torch.empty((len(indices), len(indices)))


def _principal_components(tensor: Any, r: int, device: Any, dtype: Any = None, random_seed: int = 0) -> tuple[Any, Any]:
    import torch

    b, c, h, w = tensor.shape
    r = min(r, h, w)
    return torch.empty((b, c, r, w)), torch.empty((b, c, h, r))


def _module_weight(module: Any) -> Any:
    """The weight whose norm DoRA computes; also for stand-ins of quantized layers."""
    from peftplan.libraries.quantized import module_weight

    return module_weight(module)


def _even_clusters(rows: Any, num_subspaces: int, iterations: int) -> tuple[Any, int]:
    """Clusters of equal size. Those of real weights differ in size, but not in their sum."""
    import torch

    clusters = min(num_subspaces, rows.shape[0])
    return torch.arange(rows.shape[0], device="cpu") % clusters, clusters


def _frod_projections(model: Any, config: Any, adapter_name: str) -> None:
    """FRoD's shared buffers, empty: V (in, in) per category and the places of the sparse entries (2, nnz)."""
    import torch
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.frod.model import _category_from_key
    from peft.tuners.tuners_utils import _get_in_out_features, _maybe_include_all_linear_layers

    method = model._prepare_adapter_config(config, model.get_model_config(model.model))
    method = _maybe_include_all_linear_layers(method, model.model)
    for name in ("frod_V", "frod_s_indices", "frod_s_size"):
        if not hasattr(model, name):
            setattr(model, name, torch.nn.ModuleDict())
    for key, module in model.model.named_modules():
        width, _ = _get_in_out_features(module) if hasattr(module, "weight") else (None, None)
        if width is None or not model._check_target_module_exists(method, key):
            continue
        nnz = min(int(width * width * config.sparse_rate), width * width - width)
        nnz = max(1, nnz) if config.sparse_rate > 0 and width > 1 else nnz
        shapes = {"frod_V": (width, width), "frod_s_indices": (2, nnz), "frod_s_size": (2,)}
        for name, shape in shapes.items():
            getattr(model, name)[_category_from_key(key)] = BufferDict({adapter_name: torch.empty(shape, device="cpu")})


def _frod_u_and_lambda(layer: Any, v: Any, weight: Any) -> tuple[Any, Any]:
    import torch

    n_out, n_in = weight.shape
    return torch.empty((n_out, n_in), device="cpu"), torch.empty((n_in,))


def _shira_update(layer: Any, adapter_name: str, mask: Any, *args: Any, **kwargs: Any) -> None:
    """SHiRA's `update_layer` without a mask, and the int32 places that it would be read into."""
    import torch
    from peft.tuners.shira.layer import ShiraLayer

    ShiraLayer.update_layer(layer, adapter_name, None, *args, **kwargs)
    entries = layer.shira_weight[adapter_name].numel()
    layer.shira_indices[adapter_name] = torch.empty((2, entries), dtype=torch.int32)


def _unilora_scales(model: Any, adapter_name: str) -> None:
    """UniLoRA's scales, empty: one per index, of which the layers have made buffers of the right shape."""
    import torch

    for layer in model._iter_unilora_layers():
        indices = (layer.unilora_indices_A[adapter_name], layer.unilora_indices_B[adapter_name])
        layer.update_scaling(adapter_name, *(torch.empty(i.shape) for i in indices))


STAND_INS: dict[str, dict[str, Any]] = {
    "ADAMSS": {
        "peft.tuners.adamss.layer.slice_pca": _principal_components,
        "peft.tuners.adamss.layer.clustering_Z": _even_clusters,
    },
    "BOFT": {
        "peft.tuners.boft.layer.BOFTLayer.block_butterfly_perm": _butterfly,
        "peft.tuners.boft.layer.BOFTLayer.perm2mat": _permutation,
        # The CUDA extension counts as built, as on the machine that trains; without it peft sets the butterfly factor to 1.
        "peft.tuners.boft.layer.get_fbd_cuda": object,
    },
    "FROD": {
        "peft.tuners.frod.model.FrodModel._init_frod_projections": _frod_projections,
        "peft.tuners.frod.layer.FrodLayer._calculate_frod_u_and_lambda": _frod_u_and_lambda,
    },
    "LORA": {"peft.tuners.lora.dora.dequantize_module_weight": _module_weight},
    "SHIRA": {"peft.tuners.shira.layer.Linear.update_layer": _shira_update},
    "UNILORA": {
        "peft.tuners.unilora.model.UniLoraModel._assign_unilora_indices_and_scales": _unilora_scales,
    },
}
"""peft type → what is replaced (peft)."""
