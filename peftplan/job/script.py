"""Facts about the program around a measured step that no option of a setup expresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

import peftplan.versions as versions
from peftplan.errors import InputError

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.job.setup import Setup

FLASH_TAKEN = ("gemma3", "gemma4", "gemma4_unified")
"""Model types whose classes lost FlashAttention in `versions.FLASH_BESIDE_IMAGES`."""
VERSION = r"^\d+\.\d+"
"""How the version of a package begins."""
Version = Annotated[str, Field(pattern=VERSION)]


class Script(BaseModel):
    """Facts about a hand-written program. All defaults are those of a current `plain` loop.

    Reserved bytes depend on what ran before, so the record of a published run needs them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    earlier_seq_lens: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Tokens per sequence of the steps before the reported one. If empty: one step of the same length."""
    outputs_outlive_step: bool = False
    """Whether the variable that holds the outputs keeps them until the next forward has returned."""
    outputs_end_with_backward: bool = False
    """Whether kept outputs are freed between backward and the optimizer's step (`del outputs`)."""
    empties_cache: bool = False
    """Whether `torch.cuda.empty_cache()` runs after each step, before the gradients of that step are freed."""
    repeats_kv: bool = False
    """Whether grouped keys and values are repeated before sdpa or flash-attn sees them, as kernels without grouped queries need
    it."""
    enables_adapters_again: bool = False
    """Whether adapters are disabled and enabled (`with model.disable_adapter():`) after the optimizer is constructed and before
    the first step, for example to evaluate the base. peft then makes all of an active adapter require gradients
    (tuners/tuners_utils.py, `enable_adapters`), including LoRA-FA's A. Its inputs are saved again, and its gradients exist
    although the optimizer does not use them."""
    checkpoints_hooks: bool = False
    """Whether checkpoints cover the hooks around a layer too, as with `versions.FORWARD_CHECKPOINTED` they no longer do: tools
    that refuse newer releases. Decides how ranks gather under reentrant checkpoints."""
    flash_beside_images: bool = False
    """Whether Gemma 3 and 4 with images run FlashAttention, as before `versions.FLASH_BESIDE_IMAGES`: a tool that refuses newer
    releases."""
    evaluates_logits: bool = False
    """Whether Liger's loss makes the logits of an evaluation, as before `versions.LIGER_SKIPS`: a tool that refuses newer
    releases."""
    units_of_layers: bool = False
    """Whether accelerate under FSDP2 makes units of layers alone, as before `versions.FSDP2_TAIL_APART`, and casts all weights to
    fp32, as before `versions.FSDP2_UPCASTS_ALL`: tools that refuse newer releases (`versions.PINNED_ACCELERATE`)."""
    freezes_ranknum: bool = False
    """Whether AdaLoRA's `ranknum` trains on no base, as before `versions.RANKNUM_ANEW`."""
    allocates_ranks: bool | None = None
    """Whether AdaLoRA's `update_and_allocate` runs after each optimizer step, as peft documents; None: in a plain loop alone. No
    trainer calls it; a callback of yours may. Without it peft computes no sensitivities and masks no ranks."""
    finds_unused: bool | None = None
    """Whether DDP looks for parameters without gradients where the option `find_unused_parameters` is unset; None: as the trainer
    does."""
    static_graph: bool | None = None
    """Whether DDP is told that each step's graph is that of the first, where the option `static_graph` is unset."""
    bucket_cap_mb: float | None = None
    """MiB of DDP's buckets, where the option `bucket_cap_mb` is unset."""
    torch: Version | None = None
    """The torch that ran, as `2.10.0`; None: one as in `versions.READ_IN`. Decides `cublaslt_apart` and `ties_by_address`."""
    transformers: Version | None = None
    """The transformers that ran; None: one as in `versions.READ_IN`. Decides `rotary_by_product`, `shifts_logits`,
    `reads_16_bits`, `collects_batches`, `logits_in_fp32`, `loads_in_threads`, `checkpoints_forward`, `experts_apart` and
    `masks_unpadded`, as Llama's code had it (`shifts_logits` and `logits_in_fp32`: of classes called …ForCausalLM)."""

    bitsandbytes: Version | None = None
    """The bitsandbytes that ran; None: one as in `versions.READ_IN`. Decides `dequantizes_4bit`, `keeps_4bit_inputs` and
    `shares_nested_code`."""

    @property
    def dequantizes_4bit(self) -> bool:
        """Whether every product with a 4-bit weight dequantizes it, or some are fused (`storage.fused_products`)."""
        return versions.FUSED_4BIT.after(self.bitsandbytes)

    @property
    def keeps_4bit_inputs(self) -> bool:
        """Whether a product with a 4-bit weight keeps its input until the graph is gone, checkpoint or not."""
        return versions.INPUTS_DROPPED.after(self.bitsandbytes)

    @property
    def shares_nested_code(self) -> bool:
        """Whether weights with double quantization share the table of their absmax."""
        return versions.CODE_COPIED.after(self.bitsandbytes)

    @property
    def cublaslt_apart(self) -> bool:
        """Whether cuBLASLt has its own workspaces or shares those of cuBLAS (docs/rehearse.md)."""
        return versions.ONE_WORKSPACE.after(self.torch)

    @property
    def ties_by_address(self) -> bool:
        """Whether the allocator orders free blocks of equal size by address, or by the age of their segment."""
        return versions.TIES_BY_AGE.after(self.torch)

    @property
    def rotary_by_product(self) -> bool:
        """Whether a matrix product computes the rotary angles (`LlamaRotaryEmbedding.forward`: `inv_freq_expanded @
        position_ids_expanded`). cuBLAS's workspace is then allocated before the first layer."""
        return versions.ROTARY_WITHOUT_PRODUCT.after(self.transformers)

    @property
    def shifts_logits(self) -> bool:
        """Whether the loss of a causal language model copies the fp32 logits without the last position (`ForCausalLMLoss`:
        `logits[..., :-1, :].contiguous()`), or pads the labels."""
        return versions.LABELS_PADDED.after(self.transformers)

    def reads_16_bits(self, model_type: str) -> bool:
        """Whether the loss reads the logits without the last position in their own dtype, as the class of the model had it."""
        return model_type in OF_16_BITS and self.shifts_logits

    @property
    def logits_in_fp32(self) -> bool:
        """Whether logits are fp32 before any loss, and so in the outputs (`logits = logits.float()` in the model's forward)."""
        return versions.LOGITS_STAY_16_BIT.after(self.transformers)

    @property
    def makes_logits(self) -> bool:
        """Whether Trainer has Liger's loss make the logits of an evaluation, which nothing reads."""
        return self.evaluates_logits or versions.LIGER_SKIPS.after(self.transformers)

    @property
    def checkpoints_units(self) -> bool:
        """Whether the model calls checkpointed layers as wrapped by FSDP, not the layers themselves."""
        return versions.LAYERS_CHECKPOINT.after(self.transformers)

    def runs_flash(self, architecture: Architecture) -> bool:
        """Whether the class of the model runs FlashAttention in the transformers that ran."""
        before = self.flash_beside_images or versions.FLASH_BESIDE_IMAGES.after(self.transformers)
        return architecture.supports_flash_attn or (before and architecture.model_type in FLASH_TAKEN)

    @property
    def checkpoints_forward(self) -> bool:
        """Whether a checkpoint covers a layer's forward alone, or the hooks around it too."""
        return not self.checkpoints_hooks and not versions.FORWARD_CHECKPOINTED.after(self.transformers)

    @property
    def converts_in_turn(self) -> bool:
        """Whether ZeRO-3 gathers a stack of experts alone to read it, or all of its module."""
        return not versions.CONVERTED_IN_TURN.after(self.transformers)

    @property
    def experts_apart(self) -> bool:
        """Whether each expert of a mixture is three linear layers, run one after the other, or part of two fused parameters."""
        return versions.EXPERTS_FUSED.after(self.transformers)

    @property
    def quantizes_to_host(self) -> bool:
        """Whether a rank whose loading is efficient moves each weight to the host once it is quantized, under FSDP."""
        return versions.QUANTIZED_ON_CARD.after(self.transformers)

    @property
    def loads_in_threads(self) -> bool:
        """Whether threads copy weights to the card while others are quantized there (`core_model_loading.py`; later releases ask
        for `has_on_the_fly_quantization`)."""
        ran = self.transformers
        return versions.QUANTIZING_IN_TURN.after(ran) and not versions.LOADING_IN_THREADS.after(ran)

    def updates_ranks(self, setup: Setup) -> bool:
        """Whether AdaLoRA's rank allocator is called."""
        return self.allocates_ranks if self.allocates_ranks is not None else setup.by.updates_ranks

    def keeps_keys(self, model_type: str) -> bool:
        """Whether a layer's keys and values stay in the outputs although it is checkpointed."""
        return model_type in versions.KEYS_DROPPED and versions.KEYS_DROPPED[model_type].after(self.transformers)

    def caches_rotary(self, model_type: str) -> bool:
        """Whether each layer keeps cosines and sines of all positions."""
        return model_type in versions.ROTARY_UNCACHED and versions.ROTARY_UNCACHED[model_type].after(self.transformers)

    def repeats_before(self, attention: str, model_type: str) -> bool:
        """Whether keys and values are repeated before the kernel: by the program, or by the model's class before flash-attn."""
        if attention == "sdpa":
            return self.repeats_kv or (model_type not in OWN_SDPA and versions.SDPA_GROUPED.after(self.transformers))
        by_class = attention == "flash_attention_2" and model_type in REPEATED
        return self.repeats_kv or (by_class and versions.KV_GROUPED.after(self.transformers))

    def collects_batches(self, setup: Setup) -> bool:
        """Whether the batches of all micro batches are on the device before a step, fetched while those of the step before are
        still there. Another loop frees a batch and then fetches the next."""
        return setup.by.collects_batches and not versions.BATCHES_COLLECTED.after(self.transformers)

    def masks_unpadded(self, model_type: str, setup: Setup) -> bool:
        """Whether sdpa gets a mask although the batch has none. Without a cache, some releases take its positions for those
        of packed sequences (`_preprocess_mask_arguments`); later ones check. Checkpointing turns the cache off before masks are
        made (utils/generic.py, `check_model_inputs`). Trainers other than `plain` have collators that add a mask, or pack
        documents."""
        if setup.by.packs:
            return setup.attn_implementation == "sdpa"
        version = self.transformers
        ran = versions.PACKED_POSITIONS_CHECKED.after(version) and not versions.PACKED_POSITIONS.after(version)
        checkpointing = bool(setup.gradient_checkpointing)
        without_cache = not setup.use_cache or (checkpointing and model_type not in CACHES_IN_CHECKPOINTS)
        bare = not setup.by.collates and not setup.padding and without_cache
        return ran and bare and setup.attn_implementation == "sdpa" and model_type in POSITIONS_IN_MASKS

    @classmethod
    def on(cls, **typed: str | None) -> Script:
        """A current loop with these versions of packages. Raises InputError for a string that is no version."""
        for package, version in typed.items():
            if version is not None and not re.match(VERSION, version):
                raise InputError(package, version, f"accepted: a version such as {EXAMPLES[package]}")
        if versions.FIRST_COMPARED.after(oldest := typed.get("transformers")):
            first = versions.FIRST_COMPARED.named
            raise InputError("transformers", oldest, f"nothing older than {first} was compared; accepted: that or newer")
        return NO_SCRIPT.ran_on(typed)

    def ran_on(self, packages: Mapping[str, str | None]) -> Script:
        """The same script with these versions, unless it states its own. A string that is no version, as a record may hold, is
        ignored."""
        installed = {package: packages.get(package) or "" for package in EXAMPLES if getattr(self, package) is None}
        readable = {package: version for package, version in installed.items() if re.match(VERSION, version)}
        peft = packages.get("peft") or ""
        frozen = {"freezes_ranknum": True} if re.match(VERSION, peft) and versions.RANKNUM_ANEW.after(peft) else {}
        return self.model_copy(update=readable | frozen) if readable or frozen else self


REPEATED = ("mistral", "mixtral", "qwen2")
"""Model types whose `…FlashAttention2` repeated grouped keys and values; Llama's never did."""
OWN_SDPA = ("falcon", "gpt_bigcode")
"""Model types of grouped heads whose classes called sdpa themselves, and did not repeat keys and values before it."""
OF_16_BITS = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "opt", "stablelm")
"""Model types whose classes handed `CrossEntropyLoss` their shifted logits uncast until `versions.LABELS_PADDED` (transformers
4.48.1, models/*/modeling_*.py; 4.49.0 has `loss_function` in each)."""
CACHES_IN_CHECKPOINTS = ("gpt_bigcode",)
"""Model types that make their mask with a cache under checkpointing too (each release from 4.55 to 4.57 was run)."""
POSITIONS_IN_MASKS = frozenset(
    {
        "apertus", "arcee", "bitnet", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "doge", "dots1", "ernie4_5",
        "ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2",
        "gpt_bigcode", "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "minimax", "ministral",
        "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "starcoder2", "vaultgemma",
    }
)  # fmt: skip
"""Decoders that pass their positions to `create_causal_mask` in the releases that assume packed sequences. Others built masks
differently."""

OF_DDP = {"find_unused_parameters": "finds_unused", "static_graph": "static_graph", "bucket_cap_mb": "bucket_cap_mb"}
"""Options that DDP alone has, and the field of `Script` for those of a file or of TrainingArguments."""

EXAMPLES = {"torch": "2.10", "transformers": "5.3", "bitsandbytes": "0.49"}
"""The packages whose version can be set, each with an example."""


NO_SCRIPT = Script.model_construct()
