"""What the emulated card, and ranks that are not there, do not say to NeMo Automodel's recipe (`tools.rehearsed_automodel`)."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import sys
from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any


class Agreeing:
    """`torch.distributed` whose ranks that are not there say what this one says: that all gradients are present."""

    def __init__(self, distributed: Any) -> None:
        self.distributed = distributed

    def __getattr__(self, name: str) -> Any:
        """All else is torch's."""
        return getattr(self.distributed, name)

    def all_reduce(self, tensor: Any, *, op: Any, group: Any) -> None:
        """Integers count ranks; the emulated card adds nothing."""
        if tensor.is_floating_point():
            self.distributed.all_reduce(tensor, op=op, group=group)
        else:
            tensor.copy_(tensor.cpu().fill_(group.size()))


class Told:
    """`torch.distributed` whose other ranks send tensors of this shape in bf16."""

    def __init__(self, distributed: Any, shape: tuple[int, ...]) -> None:
        self.distributed, self.shape = distributed, shape

    def __getattr__(self, name: str) -> Any:
        """All else is torch's."""
        return getattr(self.distributed, name)

    def broadcast_object_list(self, objects: list[Any], *, src: int, group: Any, device: Any) -> None:
        """What describes a tensor (nemo_automodel, recipes/kd_utils.py, `_tree_spec`)."""
        if src != self.distributed.get_rank():
            objects[0] = ("tensor", 0, self.shape, "bfloat16")


def distil(settings: dict[str, Any]) -> None:
    """Make a rank of the student's mesh go on without the teacher's, without tokenizers, and with tokens that are all scored: the
    emulated card does not say how many are."""
    from nemo_automodel.components.loss import kd_loss
    from nemo_automodel.recipes import kd_utils
    from nemo_automodel.recipes.llm import kd
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(settings["model"]["pretrained_model_name_or_path"]).vocab_size
    shape = (settings["step_scheduler"]["local_batch_size"], settings["dataset"]["length"], vocabulary)
    kd_utils.dist = Told(kd_utils.dist, shape)
    kd._verify_tokenizer_compatibility = lambda *_: None
    source = inspect.getsource(kd_loss.KDLoss).replace("valid_mask.sum() == 0", "valid_mask.numel() == 0")
    exec(source, kd_loss.__dict__)


def untimed(compile: Callable[..., Any], function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """`torch.compile` that takes the first kernel: the emulated card has no times to compare."""
    settings.pop("mode", None)
    options = {name: value for name, value in (settings.pop("options", None) or {}).items() if name != "max_autotune"}
    return compile(function, **settings, options=options or None)


def first_config(autotune: Callable[..., Any], configs: list[Any], key: list[str], **settings: Any) -> Any:
    """`triton.autotune` that takes the way to run a kernel that needs the smallest tiles, and so times none."""
    return autotune([min(configs, key=lambda config: prod([config.num_stages, *_sizes(config)]))], key, **settings)


def _sizes(config: Any) -> list[int]:
    return [size for size in config.kwargs.values() if isinstance(size, int) and size > 0]


def forget_scalars(experts: ModuleType) -> None:
    """Let the card forget a number of the loss: the backward of `weights[mask]` may ask for a count where it was written."""
    import torch

    permute, others = experts._permute_tokens_for_grouped_mm, (torch.zeros(3, device="cuda"), torch.zeros(3))

    def write(gradient: torch.Tensor) -> None:
        others[0].copy_(others[1])

    def watched(*arguments: Any, **settings: Any) -> Any:
        result = permute(*arguments, **settings)
        if result[-3].requires_grad:  # the weights of the rows
            result[-3].register_hook(write)
        return result

    experts._permute_tokens_for_grouped_mm = watched


def divide(experts: ModuleType, ranks: int) -> None:
    """Experts that `ranks` divide without an exchange: all have as many tokens, of whose rows each gets an equal share."""
    import torch

    from peftplan.rehearse.inside import known

    permute, places, gather = experts._permute_tokens_for_grouped_mm, known._places, experts.dist.all_gather
    bincount = torch.bincount

    def shared(*arguments: Any, **settings: Any) -> Any:
        known._places = lambda mask: places(mask) // ranks
        torch.bincount = lambda numbers, minlength: numbers.new_zeros(minlength)
        result = permute(*arguments, **settings)
        known._places, torch.bincount = places, bincount
        return result

    def all_gather(results: list[Any], tensor: Any, *, group: Any) -> None:
        gather(results, tensor, group=group)
        for result in results if tensor.numel() == 1 else ():
            result.copy_(tensor.cpu())

    experts._permute_tokens_for_grouped_mm = shared
    experts.dist = Gathering(experts.dist, all_gather)


class Gathering:
    """`torch.distributed` with another `all_gather`."""

    def __init__(self, distributed: Any, all_gather: Callable[..., None]) -> None:
        self.distributed, self.all_gather = distributed, all_gather

    def __getattr__(self, name: str) -> Any:
        """All else is torch's."""
        return getattr(self.distributed, name)


def hide_nothing() -> None:
    """Let torch's attention of the tool's modules run without a mask: the card does not say that rows have no padding."""
    from nemo_automodel.components.attention import utils

    source = inspect.getsource(utils.preprocess_args_and_kwargs_for_attn)
    exec(source.replace("not bool(key_mask.all().item())", "False"), utils.__dict__)


def number_one_document() -> None:
    """Let transformers make no mask of places that follow each other, as it does where a card holds them: the emulated card's
    places do not (masking_utils.py, `find_packed_sequence_indices`)."""
    from transformers import masking_utils

    masking_utils.find_packed_sequence_indices = lambda _positions: None


def register_unused(package: str) -> None:
    """A package that the recipe imports, and whose functions the rehearsed model does not call."""
    for name in (package, f"{package}.api"):
        module = ModuleType(name)
        module.__dict__.update({"__path__": [], "calc_attn": None, "get_most_recent_key": None})
        sys.modules[name] = module


def pack_by_positions(settings: dict[str, Any]) -> None:
    """Let transformers' modules run flash-attn's kernels, which the card has not, over documents whose ends it does not say."""
    import torch
    from nemo_automodel._transformers import kernel_patches
    from transformers import PreTrainedModel
    from transformers import modeling_flash_attention_utils as utils

    from peftplan.trace.cuda import flash

    length, row = settings["dataset"]["length"], settings["packed_sequence"]["packed_sequence_size"]

    def ends(_positions: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
        documents = torch.tensor(range(0, row + 1, length), dtype=torch.int32).cuda()
        return (documents, documents), (length, length)

    kernels = (flash.flash_attn_func, flash.flash_attn_varlen_func, None, flash.pad_input, flash.unpad_input)
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
    utils._lazy_imports = lambda *_, **__: kernels
    utils._is_packed_sequence = lambda _positions, batch_size: batch_size == 1
    utils.prepare_fa_kwargs_from_position_ids = ends
    kernel_patches.HAS_FA = True


def launch_nothing_of_quack() -> None:
    """Make quack-kernels' functions allocate what they do, and compile and run no kernel, of which the emulated card has none."""
    load, ctypes.CDLL = ctypes.CDLL, _Loaded  # type: ignore[misc]
    rmsnorm: Any = importlib.import_module("quack.rmsnorm")
    rotary: Any = importlib.import_module("quack.rotary")
    linear: Any = importlib.import_module("quack.linear")
    ctypes.CDLL = load  # type: ignore[misc]
    rmsnorm._compile_rmsnorm_fwd = rmsnorm._compile_rmsnorm_bwd = _unlaunched
    rotary.RotaryKernel.compile = staticmethod(_unlaunched)
    for name in ("matmul_fwd_fn", "matmul_bwd_dx", "matmul_bwd_dw"):
        setattr(linear._LinearOps, name, staticmethod(_product))


class _Loaded(ctypes.CDLL):
    """A library other than the driver, whose version the emulated card does not say."""

    def __init__(self, name: Any, *settings: Any, **more: Any) -> None:
        if name == "libcuda.so.1":
            raise OSError(name)
        super().__init__(name, *settings, **more)


def _product(a: Any, b: Any, *, bias: Any = None, out_dtype: Any = None) -> Any:
    """`quack.gemm_interface.gemm` without a place for its result."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)


def _unlaunched(*_: Any, **__: Any) -> Callable[..., None]:
    return lambda *_: None
