"""Releases of the libraries: those that the formulas were read in, the oldest that a trace runs with, and those that changed what
a step holds. Only this file compares versions.
"""

import re
from typing import NamedTuple

READ_IN = {
    "torch": "2.13",
    "transformers": "5.24",
    "peft": "0.21.2",
    "trl": "1.16",
    "accelerate": "1.16",
    "deepspeed": "0.19.8",
    "bitsandbytes": "0.50.2",
    "gptqmodel": "7.7.0",
    "liger-kernel": "0.8.5",
    "torchao": "0.18",
    "galore-torch": "1.0",
    "apollo-torch": "1.0.3",
}
"""The releases that formulas were read in. A source names a package and a file; this is the release."""

FLOORS: dict[str, tuple[int, ...]] = {"torch": (2, 8), "transformers": (5, 0), "peft": (0, 19)}
"""The oldest releases with which traces were run; the same as in pyproject.toml."""


class Change(NamedTuple):
    """A release in which a library changed what a step holds, and where its code shows it."""

    package: str
    release: tuple[int, ...]
    source: str

    @property
    def named(self) -> str:
        """The package and the release: `torch 2.9`."""
        return f"{self.package} {'.'.join(map(str, self.release))}"

    @property
    def before(self) -> str:
        """The minor release before: `5.3` of 5.4."""
        return f"{self.release[0]}.{self.release[1] - 1}"

    def after(self, version: str | None) -> bool:
        """Whether the change is still to come in this version; None is today's."""
        return version is not None and tuple(map(int, re.findall(r"\d+", version)[: len(self.release)])) < self.release


def is_before(version: str, release: str) -> bool:
    """Whether a version is earlier than a release."""
    numbers = tuple(map(int, re.findall(r"\d+", release)))
    return Change("", numbers, "").after(version)


def is_read(version: str) -> bool:
    """Whether a release of axolotl was read."""
    return any(re.match(rf"{re.escape(release)}(\D|$)", version) for release in AXOLOTL_READ)


def named(package: str) -> str:
    """The package and the release that its formulas were read in: `peft 0.21.2`."""
    return f"{package} {READ_IN[package]}"


RANKNUM_ANEW = Change("peft", (0, 20), "AdaLoRA's `ranknum` trains on a 16-bit base: 0.21.2 was read, 0.19.2 measured")
SHORTER_ALLOC_CONF = Change("torch", (2, 9), "`PYTORCH_ALLOC_CONF` replaces `PYTORCH_CUDA_ALLOC_CONF`")
ONE_WORKSPACE = Change("torch", (2, 12), "cuBLASLt takes cuBLAS's workspaces (docs/rehearse.md)")
TIES_BY_AGE = Change("torch", (2, 13), "the allocator orders equal free blocks by the age of their segment, no longer by address")
LAYERS_CHECKPOINT = Change("transformers", (4, 52), "`GradientCheckpointingLayer`: checkpointed calls lie in FSDP's units")
FORWARD_CHECKPOINTED = Change("transformers", (5, 23), "checkpoints cover a layer's `forward`, no longer the hooks around it")
CONVERTED_IN_TURN = Change("transformers", (5, 23), "under ZeRO-3 converted weights, as stacks of experts, are read one by one")
FLASH_BESIDE_IMAGES = Change(
    "transformers", (5, 24), "classes of Gemma 3 and 4 that read images set `_supports_flash_attn = False`; before, they did not"
)
LIGER_SKIPS = Change(
    "transformers", (5, 15), "`Trainer.prediction_step` passes `skip_logits` to Liger's forward; before, evaluations made logits"
)
LOGITS_STAY_16_BIT = Change("transformers", (4, 46), "the model's own forward has no `logits = logits.float()`")
BATCHES_COLLECTED = Change("transformers", (4, 46), "`Trainer.get_batch_samples` collects the batches of a whole step")
LABELS_PADDED = Change("transformers", (4, 49), "`ForCausalLMLoss` pads labels instead of `logits[..., :-1, :].contiguous()`")
PACKED_POSITIONS = Change("transformers", (4, 54), "`_preprocess_mask_arguments` reads positions as those of packed sequences")
PACKED_POSITIONS_CHECKED = Change("transformers", (5, 0), "`_preprocess_mask_arguments` looks whether positions are packed")
DTYPE_OF_CHECKPOINT = Change("transformers", (5, 0), "`from_pretrained` takes `auto` for no dtype; before, torch's default")
EXPERTS_FUSED = Change(
    "transformers", (5, 0), "`MixtralExperts` holds two 3-D parameters; before, it was a list of `MixtralBlockSparseTop2MLP`"
)
ROUTER_LOSS_BY_LAYER = Change(
    "transformers", (5, 16), "`load_balancing_loss_func` sums layer by layer; before, it joined the logits of all layers"
)
STRATEGY_BY_RESHARD = Change(
    "transformers",
    (5, 4),
    "`_process_fsdp_args` passes FSDP1's strategy as `reshard_after_forward`, no longer `sharding_strategy`",
)
FSDP_BY_PLUGIN = Change(
    "transformers", (5, 0), "`_process_fsdp_args` returns arguments of accelerate's plugin; before, FSDP1's variables"
)
FSDP_OF_VERSION_2 = Change("transformers", (5, 10), "`_process_fsdp_args`: `version` is 2 by default; before, 1")
AXOLOTL_KEEPS_TABLES = Change(
    "axolotl",
    (0, 21),
    "loaders/model.py:615 casts no table to fp32 that it would cast back; utils/config/__init__.py:481 makes checkpoints "
    "that are not reentrant; utils/schemas/validation.py:1442 refuses FSDP1; 0.19.0 was read before",
)
AXOLOTL_READ = ("0.19", "0.21")
"""The releases of axolotl that were read and rehearsed."""
FIRST_COMPARED = Change("transformers", (4, 28), "the oldest release with which a published run was compared (`data/runs`)")
MIXTURE_ADDED = {
    "mixtral": Change("transformers", (4, 36), "models/mixtral"),
    "qwen2_moe": Change("transformers", (4, 40), "models/qwen2_moe"),
    "qwen3_moe": Change("transformers", (4, 51), "models/qwen3_moe"),
    "deepseek_v3": Change("transformers", (4, 51), "models/deepseek_v3"),
    "deepseek_v2": Change("transformers", (4, 54), "models/deepseek_v2"),
    "ernie4_5_moe": Change("transformers", (4, 54), "models/ernie4_5_moe"),
}
"""Model type of a mixture whose experts were linear layers → the release that brought it."""
QUANTIZED_ON_CARD = Change(
    "transformers", (5, 0), "no `_load_state_dict_into_meta_model` that moves a quantized weight to the host"
)
LOADING_IN_THREADS = Change("transformers", (5, 0), "`core_model_loading.py` copies weights in threads")
QUANTIZING_IN_TURN = Change("transformers", (5, 4), "`core_model_loading.py` asks for `has_on_the_fly_quantization`")
TIED_AS_MADE = Change("transformers", (5, 1), "`PreTrainedModel._from_config` ties weights; before, loading did")
ADAPTERS_KEPT = Change(
    "deepspeed",
    (0, 19, 2),
    "`_cast_module_mixed_precision` leaves an adapter beside shards as it is; before, `module.bfloat16()` cast it too",
)
ULYSSES_TAKEN = Change("deepspeed", (0, 18, 2), "accelerate refuses `sp_size` with an earlier one")
LEFTOVERS_RELEASED = Change(
    "deepspeed", (0, 19, 3), "ZeRO-3 has `release_backward_leftovers` and `update_recompute_parameters`; 0.19.2 has neither"
)
FSDP1_UPCASTS = Change("accelerate", (0, 30), "`Accelerator.prepare_model` casts FSDP1's flat parameters that train to fp32")
FSDP2_UPCASTS_WHAT_TRAINS = Change("accelerate", (1, 14), "`fsdp2_prepare_model` casts `param.data` of what trains to fp32")
FSDP2_UPCASTS_ALL = Change("accelerate", (1, 13), "`fsdp2_prepare_model` has no `model.to(torch.float32)`")
PINNED_ACCELERATE = "1.11"
"""The newest accelerate that LLaMA-Factory 0.9.5 runs with."""
FSDP2_FIRST_REHEARSED = Change("accelerate", (1, 8), "the oldest release whose `fsdp2_prepare_model` was rehearsed")
FSDP2_IN_GROUPS = Change("accelerate", (1, 10), "`ParallelismConfig`, which makes groups of ranks under FSDP2")
FSDP2_TAIL_APART = Change("accelerate", (1, 14), "`fsdp2_prepare_model` makes units of the embedding and of norm and head")
FSDP_SKIPS_ABSENT_CLASSES = Change("accelerate", (1, 16), "wrap policies leave out classes that no module is of")
FSDP2_KEEPS_LAST_LOADED = Change(
    "accelerate", (1, 16), "`fsdp2_load_full_state_dict` drops a tensor once the next is on the device; before, as it asks for it"
)
INPUTS_DROPPED = Change("bitsandbytes", (0, 43, 2), "`MatMul4Bit.forward` keeps `(None, B)` as `ctx.tensors`; before, `(A, B)`")
CODE_COPIED = Change("bitsandbytes", (0, 46), "`quantize_blockwise` keeps a copy of its code; before, all weights shared one")
FUSED_4BIT = Change("bitsandbytes", (0, 50), "`MatMul4Bit.forward` calls `gemm_4bit`; before, it dequantized every weight")
LATENT_CACHED = Change(
    "transformers", (5, 15), "`DeepseekV3Attention` caches latent keys and values, and expands four dimensions"
)
MESH_OF_ALL_RANKS = Change("transformers", (5, 18), "`initialize_distributed_mesh` refuses a mesh that leaves ranks out")
ROTARY_WITHOUT_PRODUCT = Change("transformers", (5, 19), "`LlamaRotaryEmbedding.forward` makes no product with `position_ids`")
KV_GROUPED = Change("transformers", (4, 48), "`flash_attention_forward` gets grouped keys; before, `repeat_kv` ran before it")
SDPA_GROUPED = Change("transformers", (4, 54), "`sdpa_attention_forward` gets grouped keys; before, `repeat_kv` ran in it")
KEYS_DROPPED = {
    "gpt_bigcode": Change(
        "transformers",
        (4, 53),
        "`GPTBigCodeModel.forward` sets `use_cache = False` beside checkpoints; before, it returned `presents`",
    ),
}
"""Model type → the release in which layers under checkpoints no longer return keys and values that the outputs hold."""
ROTARY_UNCACHED = {
    "llama": Change("transformers", (4, 41), "`LlamaRotaryEmbedding` has no `_cos_cached`"),
    "mistral": Change("transformers", (4, 42), "`MistralRotaryEmbedding` has no `cos_cached`"),
    "qwen2": Change("transformers", (4, 45), "`Qwen2RotaryEmbedding` has no `cos_cached`"),
    "mixtral": Change("transformers", (4, 48), "`MixtralRotaryEmbedding` has no `cos_cached`"),
}
"""Model type → the release whose layers no longer keep cosines and sines of all positions."""


def behaviour(package: str, version: str | None) -> tuple[bool, ...]:
    """Which changes of a package are still to come in a version: what tells two versions apart here."""
    known = (change for value in globals().values() for change in (value.values() if isinstance(value, dict) else (value,)))
    return tuple(change.after(version) for change in known if isinstance(change, Change) and change.package == package)
