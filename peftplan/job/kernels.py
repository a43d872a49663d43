"""Kernels of other packages that replace parts of a model: which function each is, and those facts of it that decide memory.

A kernel is one autograd function. Its formula is written once for all packages (`memory.fused_layers`, `memory.lora_kernels`) and
asks for the facts of these records (`job.kernel_facts`); only this file compares names.

Unsloth's formulas are of layers that torch does not compile. By default those are layers of batches without padding, packed into
one row; with UNSLOTH_BLOCK_COMPILE=0 also layers of padded batches, which run every kernel of unsloth but `unsloth.padding_free`.
"""

from collections.abc import Iterable
from typing import NamedTuple

from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, UnknownNameError
from peftplan.job.kernel_facts import (
    Balanced,
    ByOperation,
    Checkpoint,
    CompiledAttention,
    CompiledLayers,
    Decoder,
    Documents,
    Exchange,
    FakeQuantized,
    Float8,
    Gated,
    HostEmbedding,
    Kernel,
    LayerNorms,
    Lora,
    Narrow,
    Norm,
    OffloadedActivations,
    PaddingFree,
    Projections,
    Remade,
    Rotary,
    Rule,
    Scales,
    Scan,
    SeparateExperts,
)
from peftplan.units import MIB

INT8_INT4 = "int8-int4"
"""The scheme of QAT that unties the head, and fake-quantizes the embedding to int8."""
UNSLOTH_DECODER = Decoder(
    "unsloth 2026.10.9, models/llama.py (`LlamaModel_fast_forward`, `LlamaRotaryEmbedding`)", positions=4 * 8192
)
UNSLOTH_NORM = Norm("unsloth 2026.10.9, kernels/rms_layernorm.py (`Fast_RMS_Layernorm`)", partial_rows=4)
UNSLOTH_PADDING_FREE = PaddingFree("unsloth 2026.10.9, utils/attention_dispatch.py (`_sdpa_packed_segments`)")
UNSLOTH_CHECKPOINT = Checkpoint(
    "unsloth_zoo 2026.10.9, gradient_checkpointing.py (`UnslothCheckpointFunction`)", buffers=2, least_bytes=2 * MIB
)
UNSLOTH_LORA = Lora("unsloth 2026.10.9, kernels/fast_lora.py", overwrites_input=True, global_buffer=True, drops_inside=True)
AXOLOTL_LORA = Lora("axolotl 0.21.0, kernels/lora.py", saves_casts=True, wide_gradients=True, takes_bias=True, drops_outside=True)

IN_8_BITS = "transformer-engine 2.20.2, pytorch/module/grouped_linear.py (`_GroupedLinear`) under autocast"
KERNELS: dict[str, Kernel] = {
    "unsloth.decoder": UNSLOTH_DECODER,
    "unsloth.padding_free": UNSLOTH_PADDING_FREE,
    "unsloth.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth.rms_norm": UNSLOTH_NORM,
    "unsloth.rope": Rotary(
        "unsloth 2026.10.9, kernels/rope_embedding.py (`Fast_RoPE_Embedding_QK_Positions`), qk_norm_rope.py",
        backward_in_place=False,
        norms=True,
    ),
    "unsloth.lora_mlp": UNSLOTH_LORA,
    "unsloth.lora_qkv": UNSLOTH_LORA,
    "unsloth.lora_o": UNSLOTH_LORA,
    "unsloth-compiled.layers": CompiledLayers("unsloth 2026.10.9, models/_block_compile.py (`patch_block_compile`)"),
    "unsloth-compiled.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-tiled.layers": CompiledLayers("unsloth_zoo 2026.10.9, tiled_mlp.py (`patch_tiled_mlp`)", tiles=True),
    "unsloth-tiled.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-rows.layers": CompiledLayers("unsloth 2026.10.9, models/_block_compile.py (`patch_block_compile`)", rows=True),
    "unsloth-rows.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-function.layers": CompiledLayers(
        "unsloth_zoo 2026.10.9, fused_losses/forward_adapter.py (`unsloth_fused_lm_head_loss`)", rows=True, by_function=True
    ),
    "unsloth-function.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-padded.decoder": UNSLOTH_DECODER,
    "unsloth-padded.layers": CompiledLayers("unsloth 2026.10.9, models/llama.py (`_legacy_block_compile`)", rows=True),
    "unsloth-padded.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-padded.rms_norm": UNSLOTH_NORM,
    "unsloth-qat-lora.decoder": UNSLOTH_DECODER,
    "unsloth-qat-lora.padding_free": UNSLOTH_PADDING_FREE,
    "unsloth-qat-lora.layers": CompiledLayers("unsloth 2026.10.9, kernels/utils.py (`get_lora_parameters`)", scheme="int4"),
    "unsloth-qat-lora.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-qat-lora.rms_norm": UNSLOTH_NORM,
    "unsloth-qat-int4.layers": CompiledLayers(
        "unsloth 2026.10.9, models/_block_compile.py, models/_utils.py (`_prepare_model_for_qat`)", scheme="int4"
    ),
    "unsloth-qat-int4.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-qat-int8-int4.layers": CompiledLayers(
        "unsloth 2026.10.9, models/_block_compile.py, models/_utils.py (`_prepare_model_for_qat`)", scheme=INT8_INT4
    ),
    "unsloth-qat-int8-int4.checkpoint": UNSLOTH_CHECKPOINT,
    "unsloth-offload.embedding": HostEmbedding("unsloth 2026.10.9, models/vision.py (`_install_offload_embedding_hooks`)"),
    "unsloth-experts.separate": SeparateExperts(
        "transformers as the notebook pins it, models/ernie4_5_moe/modeling_ernie4_5_moe.py (`Ernie4_5_MoeSparseMoeBlock`)"
    ),
    "axolotl-offload.activations": OffloadedActivations(
        "trl, models/activation_offloading.py (`OffloadActivations`), as axolotl 0.19.0 puts it around each step"
    ),
    "trl-offload.activations": OffloadedActivations("trl, models/activation_offloading.py (`OffloadActivations`)"),
    "swift-offload.activations": OffloadedActivations("ms-swift 4.6.0, callbacks/activation_cpu_offload.py", by_layer=True),
    "axolotl.lora_mlp": AXOLOTL_LORA,
    "axolotl.lora_qkv": AXOLOTL_LORA,
    "axolotl.lora_o": AXOLOTL_LORA,
    "axolotl-fused.rope": Rotary(
        "axolotl 0.19.0, kernels/gemma4_fused_rope.py (`fused_rms_norm_rope`)",
        backward_in_place=False,
        norms=True,
        partial_rows=8,
    ),
    "liger.rms_norm": Norm("liger-kernel, ops/rms_norm.py (`LigerRMSNormFunction`)"),
    "liger.layer_norm": LayerNorms("liger-kernel, ops/layer_norm.py (`LigerLayerNormFunction`)"),
    "liger.rope": Rotary("liger-kernel, ops/rope.py (`LigerRopeFunction`)", backward_in_place=True),
    "torch-norm.rms_norm": Norm("torch, native/cuda/layer_norm_kernel.cu (`_fused_rms_norm`)", False, 0, in_python=False),
    "te-norm.rms_norm": Norm("transformer-engine 2.20.2, pytorch/ops/basic/rmsnorm.py (`RMSNorm`)", False, 0),
    "quack.rms_norm": Norm(
        "quack-kernels 0.6.4, rmsnorm.py (`RMSNormFunction`), rmsnorm_config.py (`_get_sm_count_hopper`)",
        *(False, 2),
        of_narrow=((256, 16), (1024, 8), (2048, 4)),
    ),
    "quack.rope": Rotary("quack-kernels 0.6.4, rotary.py (`ApplyRotaryEmb`)", backward_in_place=True),
    "torch-lora.adapters": ByOperation(
        "nemo_automodel 0.7.0, components/_peft/lora.py (`LinearLoRA.forward` without `use_memory_efficient_lora`)"
    ),
    "torch-compile.residual": Remade("nemo_automodel 0.7.0, components/distributed/parallelizer.py (`_apply_per_layer_compile`)"),
    "torch-compile-attn.self_attention": CompiledAttention(
        "nemo_automodel 0.7.0, components/models/qwen3_moe/layers.py (`Qwen3MoEAttention`) and deepseek_v3/layers.py (`MLA`) "
        "with `compile_attn`"
    ),
    "torchao.fake_quant": FakeQuantized("torchao, quantization/qat/linear.py (`Int8DynActInt4WeightQATLinear`)", group=256),
    "torchao-int4.fake_quant": FakeQuantized(
        "torchao, quantization/qat/fake_quantizer.py (`Int4WeightFakeQuantizer`), as axolotl 0.19.0 configures it",
        group=32,
        by_range=True,
    ),
    "torchao-mxfp4.fake_quant": FakeQuantized(
        "torchao, prototype/qat/mx.py (`MXFakeQuantizedLinear`), as axolotl 0.19.0 configures it", group=32, in_mx=True
    ),
    "torchao-float8.linear": Float8("torchao, float8/float8_linear.py (`Float8Linear`)"),
    "te.attention": Documents("transformer-engine 2.20.2, pytorch/attention/dot_product_attention/backends.py (`FusedAttnFunc`)"),
    "mamba-ssm.scan": Scan(
        "mamba-ssm 2.3.2, ops/triton/ssd_combined.py (`MambaSplitConv1dScanCombinedFn`), with causal-conv1d 1.6"
    ),
    "fla.delta_rule": Rule("flash-linear-attention 0.5.2, ops/gated_delta_rule/chunk.py (`ChunkGatedDeltaRuleFunction`)"),
    "deepep.exchange": Exchange("DeepEP at 94a9f8f6, deep_ep/buffer.py, as nemo_automodel calls it"),
    "deepep-again.exchange": Exchange("DeepEP at 94a9f8f6, deep_ep/buffer.py, whose dispatch checkpoints repeat", replays=False),
    "hybridep.exchange": Exchange("DeepEP at 94a9f8f6, deep_ep/hybrid_ep_buffer.py, as nemo_automodel calls it", hybrid=True),
    "uccl.exchange": Exchange("nemo_automodel 0.7.0, components/moe/uccl_ep/_buffer.py", replays=False),
    "balanced.gate": Balanced("nemo_automodel 0.7.0, components/moe/layers.py (`FakeBalancedGate`)"),
    "te-linear.dense": Projections("transformer-engine 2.20.2, pytorch/module/linear.py (`_Linear`)"),
    "quack-linear.dense": Projections("quack-kernels 0.6.4, linear.py (`LinearFunc`), which needs no workspace", 0),
    "te-experts.experts": Projections(
        "transformer-engine 2.20.2, pytorch/module/grouped_linear.py (`_GroupedLinear`)", workspaces=4
    ),
    "te-mxfp8.experts": Projections(f"{IN_8_BITS} in MXFP8", 4, Narrow(Scales(32, "uint8"), Scales(32, "uint8"), rows=32)),
    "te-fp8.experts": Projections(f"{IN_8_BITS} with current scaling, on H100", 4, Narrow()),
    "te-fp8-blocks.experts": Projections(f"{IN_8_BITS} with block scaling, on H100", 4, Narrow(Scales(128, "fp32"))),
    "liger.glu": Gated("liger-kernel, ops/swiglu.py (`LigerSiLUMulFunction`), ops/geglu.py (`LigerGELUMulFunction`)"),
}
"""Package and part → the kernel."""
PACKAGES = tuple(dict.fromkeys(name.partition(".")[0] for name in KERNELS))
NONE = "none"
OF_TORCHTUNE = ("torchao.fake_quant",)
"""Kernels of torchtune's recipes, and of no other trainer."""
IN_INT4, IN_MXFP4 = OF_AXOLOTL = ("torchao-int4.fake_quant", "torchao-mxfp4.fake_quant")
"""Fake-quantized layers that axolotl makes, and no other trainer."""
FLOAT8 = ("torchao-float8.linear",)
DOCUMENTS = ("te.attention",)
OF_EXPERTS = (
    *("deepep.exchange", "deepep-again.exchange", "hybridep.exchange", "uccl.exchange"),
    *("balanced.gate", "te-linear.dense", "te-experts.experts", "te-mxfp8.experts"),
    *("te-fp8.experts", "te-fp8-blocks.experts", "quack-linear.dense"),
)
BY_OPERATION = "torch-lora.adapters"
OF_COMPILED = "torch-compile.residual"
OF_COMPILED_ATTENTION = "torch-compile-attn.self_attention"
OF_QUACK = ("quack.rms_norm", "quack.rope")
OF_AUTOMODEL = (
    *(*FLOAT8, *DOCUMENTS, *OF_EXPERTS, "torch-norm.rms_norm", "te-norm.rms_norm", *OF_QUACK, BY_OPERATION, OF_COMPILED),
    OF_COMPILED_ATTENTION,
)
"""Kernels of NeMo Automodel's recipe, and of no other trainer."""


class Kernels(NamedTuple):
    """The kernel of each part of a model, None where the model's own code runs."""

    decoder: Decoder | None = None
    padding_free: PaddingFree | None = None
    checkpoint: Checkpoint | None = None
    layers: CompiledLayers | None = None
    rms_norm: Norm | None = None
    layer_norm: LayerNorms | None = None
    rope: Rotary | None = None
    glu: Gated | None = None
    lora_mlp: Lora | None = None
    lora_qkv: Lora | None = None
    lora_o: Lora | None = None
    fake_quant: FakeQuantized | None = None
    linear: Float8 | None = None
    attention: Documents | None = None
    embedding: HostEmbedding | None = None
    separate: SeparateExperts | None = None
    activations: OffloadedActivations | None = None
    scan: Scan | None = None
    delta_rule: Rule | None = None
    exchange: Exchange | None = None
    gate: Balanced | None = None
    dense: Projections | None = None
    experts: Projections | None = None
    adapters: ByOperation | None = None
    residual: Remade | None = None
    self_attention: CompiledAttention | None = None

    @property
    def sets_up_allocator(self) -> bool:
        """Whether their package sets up torch's allocator, as Unsloth does, whose decoders and compiled layers these are.

        It sets `expandable_segments` (unsloth_zoo, __init__.py) and `torch_empty_cache_steps`, by which Trainer empties the cache
        before each backward of the first step (models/rl.py:3322).
        """
        return self.decoder is not None or self.layers is not None


def named_kernels(value: object) -> tuple[str, ...]:
    """Names of kernels, a package's name being all of its own, in the order of `KERNELS`; `none` is none.

    Raises UnknownNameError for another name, InputError for two kernels of one part.
    """
    if value is None or isinstance(value, str):
        words: Iterable[object] = [] if value is None else value.split(",")
    elif isinstance(value, Iterable):
        words = value
    else:
        words = [value]
    names: set[str] = set()
    for each in words:
        name = each.strip() if isinstance(each, str) else each
        if name == NONE:
            continue
        if not isinstance(name, str) or (name not in KERNELS and name not in PACKAGES):
            raise UnknownNameError("kernels", name, (NONE, *PACKAGES), beside=KERNELS, also="; or one of their parts")
        names |= {kernel for kernel in KERNELS if name in (kernel, kernel.partition(".")[0])}
    chosen = tuple(name for name in KERNELS if name in names)
    parts = [name.partition(".")[2] for name in chosen]
    twice = next((part for part in parts if parts.count(part) > 1), None)
    if twice is not None:
        both = " and ".join(name for name in chosen if name.partition(".")[2] == twice)
        raise InputError("kernels", ", ".join(map(str, words)), f"accepted: one kernel of each part, not {both}")
    return chosen


def kernels_of(names: Iterable[str]) -> Kernels:
    """The kernels of these names, by the part that each replaces."""
    return Kernels(**{name.partition(".")[2]: KERNELS[name] for name in names})  # type: ignore[arg-type]


def kernels_in(names: Iterable[str], architecture: Architecture) -> Kernels:
    """The same in a model: Liger leaves the positions of GLM-4 to the model, and its norms make gradients of their own
    (liger-kernel, transformers/monkey_patch.py, `apply_liger_kernel_to_glm4`); axolotl takes Mistral's attention for that of
    Mistral 3, which Ministral 3's layers do not have (axolotl 0.19.0, monkeypatch/lora_kernels.py:198)."""
    kernels, model_type = kernels_of(names), architecture.model_type
    if model_type == "mistral3" and any(a.scaled_queries for block in architecture.blocks for a in block.attentions):
        return kernels._replace(lora_qkv=None, lora_o=None)
    if model_type != "glm4" or kernels.rms_norm is None:
        return kernels
    return kernels._replace(rope=None, rms_norm=kernels.rms_norm._replace(reuses_gradient=False))


def packages_of(names: Iterable[str]) -> str:
    """The names as a person states them: a package that replaces all that it can, by its name alone."""
    names = tuple(names)
    names_shown: list[str] = []
    for package in PACKAGES:
        own = [name for name in KERNELS if name.startswith(f"{package}.")]
        here = [name for name in own if name in names]
        names_shown += [package] if here == own else here
    return ", ".join(names_shown) or NONE


COMPILED = tuple(name.partition(".")[0] for name, kernel in KERNELS.items() if isinstance(kernel, CompiledLayers))
"""Packages that compile whole layers, whatever model it is."""
WITH_FORMULA = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers have formulas with the kernels of every package."""
SCANNING = ("nemotron_h", "falcon_h1")
"""Model types with Mamba 2, whose formula is that of mamba-ssm's function."""
DIVIDED = ("qwen3_moe", "glm4_moe_lite", "deepseek_v3", "nemotron_h", "gpt_oss", "minimax_m2", "glm_moe_dsa", "ernie4_5_moe")
"""Mixtures whose experts NeMo Automodel divides among ranks."""
WITH_FAKE_GATE = ("qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "glm4_moe_lite", "minimax_m2", "glm_moe_dsa", "nemotron_h")
"""Those of them whose experts the tool's fake gate gave tokens in turn."""
DELTA_RULES = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
"""Model types with a gated delta rule that flash-linear-attention computes."""
OF_PACKAGE = {
    "unsloth": (*WITH_FORMULA, "gemma"),
    "liger": (*WITH_FORMULA, "smollm3", "glm4"),
    "axolotl": (
        *(*WITH_FORMULA, "smollm3", "gemma", "gemma2", "gemma3_text", "cohere2", "glm4", "seed_oss", "hunyuan_v1_dense"),
        *("gemma3", "mistral3", "qwen3_vl"),
    ),
    "axolotl-fused": ("qwen3",),
    "trl-offload": (*WITH_FORMULA, "cohere2"),
    "torchao-float8": ("mistral", "granite", "starcoder2", "cohere2", "gemma2", "llama", "qwen2", "phi3", "glm"),
    "te": ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe_lite", "deepseek_v3", "gpt_oss", "nemotron_h"),
    "deepep": (*DIVIDED, "gemma4", "qwen3_vl_moe", "qwen3_5_moe"),
    **dict.fromkeys(("uccl", "te-experts", "te-mxfp8", "te-fp8", "te-fp8-blocks"), DIVIDED),
    "te-linear": (*DIVIDED, "glm4_moe", "qwen3_vl_moe"),
    "hybridep": (
        *("gpt_oss", "glm4_moe", "qwen3_moe", "deepseek_v3", "minimax_m2", "glm_moe_dsa", "qwen3_next", "qwen3_vl_moe"),
        *("qwen3_5_moe", "nemotron_h"),
    ),
    "torch-norm": ("llama", "qwen2", *WITH_FAKE_GATE),
    **dict.fromkeys(("torch-lora", "torch-compile"), ("llama", "qwen2")),
    "torch-compile-attn": ("qwen3_moe", "deepseek_v3"),
    "quack": ("llama", "qwen2", "qwen3_moe"),
    "quack-linear": ("qwen3_moe",),
    "te-norm": WITH_FAKE_GATE,
    **dict.fromkeys(("deepep-again", "balanced"), WITH_FAKE_GATE),
    "mamba-ssm": SCANNING,
    "fla": DELTA_RULES,
    "unsloth-experts": ("ernie4_5_moe",),
}
"""Package → the model types whose layers have formulas with its kernels, where they are more or others."""


def without_formula(names: Iterable[str] | None, model_type: str, task_type: str) -> str | None:
    """Why a step with these kernels has no formula; None where it has one."""
    for package in dict.fromkeys(name.partition(".")[0] for name in names or ()):
        known = OF_PACKAGE.get(package, WITH_FORMULA)
        if package not in COMPILED and (model_type not in known or task_type != "CAUSAL_LM"):
            return f"{package}'s kernels in {model_type} for {task_type}"
    return None
