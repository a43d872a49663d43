"""What was rehearsed or traced over several GPUs: trainers, methods and models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.running import SHOWN_PICTURES
from peftplan.distributed.layout import ACCELERATE, AUTOMODEL
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.job.automodel import OF_ATTENTION, builds
from peftplan.job.automodel_scans import has_own_code
from peftplan.job.beside_towers import knows_tower
from peftplan.job.loss_sizes import CUT
from peftplan.job.repositories import OVER_PACKED, PACKED
from peftplan.job.trainers import DEFAULT
from peftplan.memory.models import FORWARDS, OF_TEXT_PARTS
from peftplan.memory.unit_groups import tied
from peftplan.memory.zero3_modules import LEAVES

if TYPE_CHECKING:
    from peftplan.job.job import Job


FLAT = ("zero1", "zero2")
"""Strategies whose ranks hold all weights in 16 bits, and flat groups of what trains."""
ZERO = ("zero0", *FLAT, "zero3")
FSDP = ("fsdp1", "fsdp2")
SHARDING = (*FSDP, *ZERO)
UNDER_DEVICE_MAP = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose steps were rehearsed; Mistral runs Llama's operations."""
UNDER_DEEPSPEED = (
    *(*UNDER_DEVICE_MAP, "smollm3", "granite", "olmo", "olmo2", "phi3", "glm4", "starcoder2", "gemma2", "gemma3_text"),
    *("cohere", "cohere2", "stablelm", "phi", "gptj", "gpt_neox", "gpt2", "opt", "bloom", "falcon"),
    *("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "gpt_oss"),
    *("seed_oss", "exaone4", "arcee", "ernie4_5", "hunyuan_v1_dense", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"),
    *("gemma4", "gemma4_unified", "mistral3", "qwen3_vl_moe", "internvl", "llava", "idefics3", "mllama", "lfm2_vl", "lfm2"),
    *("qwen3_5", "qwen3_5_text", "qwen3_5_moe_text"),
)
"""The same under DeepSpeed."""
CONVOLVING = ("lfm2", "lfm2_vl")
"""Model types with a short convolution in the place of some layers' attention."""
SHOWN_METHODS = ("full", "lora", "rslora", "qlora")
"""Methods whose steps were rehearsed under FSDP and ZeRO (docs/reference/several-gpus.md); rsLoRA runs LoRA's operations."""
OF_LAYERS = ("dora", "loha", "lokr", "ia3", "oft", "ln-tuning", "bitfit", "partial", "llama-pro", "lora+")
TRACED_METHODS = {
    "fsdp1": ("oft", "ln-tuning", "lora+"),
    "fsdp2": OF_LAYERS,
    **dict.fromkeys(FLAT, (*OF_LAYERS, "boft", "adalora", "lora-fa")),
    "zero3": (*OF_LAYERS, "boft", "vera", "lora-fa"),
}
"""Strategy → other methods whose step was traced (tests/distributed/traced_methods.jsonl), and some rehearsed
(tests/rehearse/methods.jsonl)."""
OF_PREFERENCES = ("dora", "loha", "ia3", "oft")
"""The same under ZeRO-2 where TRL's trainers of preferences and rewards train (tests/rehearse/preferences.jsonl)."""
OVER_4_BITS = {
    "fsdp2": ("dora", "oft", "ln-tuning"),
    **dict.fromkeys(FLAT, ("dora", "oft", "ln-tuning", "boft", "adalora")),
    "zero3": ("dora", "oft", "ln-tuning", "boft"),
}
"""The same over a base in 4 bits."""
OF_DENSE = ("prompt-tuning", "p-tuning", "prefix-tuning", "fourierft", "houlsby", "pfeiffer")
PLAIN_METHODS = {
    "fsdp1": ("prompt-tuning", "p-tuning", "prefix-tuning", "bitfit", "partial", "llama-pro"),
    "fsdp2": (*OF_DENSE, "boft"),
    **dict.fromkeys(FLAT, OF_DENSE),
    "zero3": (*OF_DENSE, "adalora"),
}
"""The same of those that were so with dense models alone, in bf16 and all on the card."""
SCAN = ("mamba-ssm.scan",)
CLASSIFIERS_UNDER_DEEPSPEED = ("distilbert", "bert", "roberta", "deberta-v2")
"""Encoders that were rehearsed there as classifiers of sequences."""


def shown_methods(job: Job) -> tuple[str, ...]:
    """The methods that were rehearsed with this trainer."""
    assert job.distributed is not None
    by, strategy = job.setup.by, job.distributed.strategy
    if by.weighs_tokens:
        if strategy != "fsdp2" or not tied(job.architecture):
            return ("full",)
        return ("full", "partial", *(("lora", "qlora") if _adapts_by_v1(job) else ()))
    if by.own_fsdp2 and strategy == "fsdp2":
        return ("qlora",) if adapts_mixture(job) else ("full",)
    if by.generates and strategy == "zero3":
        return ("full", "lora", *(("partial",) if by.gathers_when_called else ()))  # of a text part: `of_tools`
    if by.own_modules and strategy == "fsdp2":
        return (*SHOWN_METHODS, "dora")
    with_tower = (job.method.name,) if job.method and by.own_lora and knows_tower(job) else ()
    shown = (by.sums_rows and strategy == "zero3") or (by.reloads_weights and strategy == "zero1")
    if by.shows_picture and shown and job.architecture.model_type in SHOWN_PICTURES:
        with_tower = ("partial",)  # of a text part: tests/rehearse/swift.jsonl
    if not knows_methods(job):
        return (*SHOWN_METHODS, *with_tower)
    known = (*SHOWN_METHODS, *with_tower, *traced_methods(job))
    if job.quant is not None or by.of_preferences:
        return known
    return (*known, *(PLAIN_METHODS.get(strategy, ()) if is_plain(job) else ()))


def traced_methods(job: Job) -> tuple[str, ...]:
    """The other methods that were traced over such a base: QDoRA is DoRA over 4 bits."""
    assert job.distributed is not None
    if job.setup.by.of_preferences:
        return OF_PREFERENCES
    known = (TRACED_METHODS if job.quant is None else OVER_4_BITS).get(job.distributed.strategy, ())
    known = (*known, "boft") if job.quant is not None and packs_on_card(job) else known
    return (*known, "qdora") if job.quant is not None and "dora" in known else known


def _adapts_by_v1(job: Job) -> bool:
    """Whether LLaMA-Factory v1's LoRA was rehearsed: over 16 bits, or 4 bits in halves that FSDP2 casts to bf16, without saved
    modules."""
    quant, config = job.quant, job.config
    known = quant is None or (quant.name == "nf4" and quant.quant_storage in SIXTEEN_BITS)
    return known and config is not None and is_bare(job)


def is_bare(job: Job) -> bool:
    """Whether an adapter has neither DoRA nor saved modules."""
    return not getattr(job.config, "modules_to_save", None) and not getattr(job.config, "use_dora", False)


def shows_dora(job: Job) -> bool:
    """Whether a job resembles those with DoRA, whatever its method is called."""
    return job.setup.by.own_modules or (knows_methods(job) and "dora" in traced_methods(job))


def shows_base(job: Job) -> bool:
    """Whether a quantized base was rehearsed: in 4 bits, in 8 with LoRA under ZeRO, or packed by gptqmodel beside LoRA."""
    assert job.quant is not None
    assert job.distributed is not None
    plain_lora = job.method_name == "lora" and not getattr(job.config, "use_dora", False)
    in_8_bits = job.quant.name == "int8" and job.distributed.strategy in (*FLAT, "zero3") and knows_methods(job) and plain_lora
    by_trainer = job.setup.by.traced_on_ranks and not job.setup.by.of_preferences and job.setup.autocast == "bf16"
    on_card = {job.distributed.offload_params, job.distributed.offload_optimizer} <= {None, "none"}
    packed = job.quant.name in PACKED and job.distributed.strategy in OVER_PACKED and by_trainer and on_card
    return job.quant.name in ("nf4", "fp4") or in_8_bits or (packed and plain_lora)


def knows_methods(job: Job) -> bool:
    """Whether a job resembles those that were traced or rehearsed with other methods: Trainer or SFTTrainer trains in 16 bits,
    with weights on the card; a dense model under FSDP1, over a quantized base, and where FSDP offloads it."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    offloads = {distributed.offload_params, None if distributed.strategy in FLAT else distributed.offload_optimizer}
    by_trainer = setup.by.traced_on_ranks and (not setup.by.of_preferences or _is_plain_zero2(job))
    narrow = setup.dtype == setup.autocast and setup.dtype in SIXTEEN_BITS
    flat = distributed.strategy == "fsdp1"
    of_host = flat or (distributed.strategy == "fsdp2" and job.quant is None and is_dense(job))
    fits = (of_host or offloads <= {None, "none"}) and (is_dense(job) or not (flat or job.quant))
    return by_trainer and not setup.kernels and fits and narrow


def _is_plain_zero2(job: Job) -> bool:
    assert job.distributed is not None
    return job.distributed.strategy == "zero2" and job.quant is None and is_plain(job)


def is_dense(job: Job) -> bool:
    """Whether no layer has experts."""
    return all(block.mlp.variant != "moe" for block in job.architecture.blocks)


def is_plain(job: Job) -> bool:
    """Whether a dense model trains in bf16 and all on the card."""
    distributed = job.distributed
    assert distributed is not None
    offloads = {distributed.offload_params, distributed.offload_optimizer}
    return is_dense(job) and job.setup.dtype == "bf16" and offloads <= {None, "none"}


def is_like_traced(job: Job) -> bool:
    """Whether a job resembles those that were traced: as `knows_methods`, a dense model in bf16 and all on the card."""
    distributed = job.distributed
    assert distributed is not None
    alike = knows_methods(job) and knows_optimizers(job) and is_plain(job) and job.quant is None
    return alike and distributed.strategy in ("fsdp2", *FLAT, "zero3")


def knows_optimizers(job: Job) -> bool:
    """Whether a job resembles those that were traced or rehearsed with other optimizers: Trainer or SFTTrainer trains a dense
    model in bf16, all on the card or offloaded by FSDP, or under ZeRO-3 with shards on the host; its base may be quantized."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    by_trainer = setup.by.traced_on_ranks and not setup.by.of_preferences
    steps_on_card = distributed.offload_optimizer in (None, "none") and distributed.offload_params != "nvme"
    stays = steps_on_card or distributed.strategy in FSDP
    return by_trainer and stays and not setup.kernels and is_dense(job) and setup.dtype == setup.autocast == "bf16"


def adapts_mixture(job: Job) -> bool:
    """Whether axolotl trains GLM-4.7-Flash over 4 bits, its experts too, under FSDP2, as was rehearsed with checkpoints of parts
    of its layers and torchao's 8-bit AdamW (tests/rehearse/published.jsonl): packed in bf16, of rows without padding."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    by_axolotl = setup.by.own_fsdp2 and distributed.strategy == "fsdp2" and not setup.kernels and setup.loss == CUT
    of_mixture = job.architecture.model_type == "glm4_moe_lite" and job.method_name == "qlora" and bool(setup.quant_experts)
    parts = bool(distributed.checkpoints_parts) and bool(setup.gradient_checkpointing) and not setup.use_reentrant
    plain = setup.dtype == setup.autocast == "bf16" and distributed.offload_params in (None, "none")
    stored = job.quant is not None and (job.quant.name, job.quant.quant_storage) == ("nf4", "bf16") and not setup.padding
    alone = getattr(job.config, "bias", "none") == "none" and not getattr(job.config, "modules_to_save", None)
    loads = not distributed.cpu_ram_efficient_loading and setup.gradient_accumulation_steps > 1
    divides = distributed.reshard_after_forward is not False and setup.attn_implementation != "eager"
    return by_axolotl and of_mixture and parts and plain and stored and alone and loads and divides


def adapts_in_zero3(job: Job) -> bool:
    """Whether axolotl trains LoRA of Llama, by its kernels or without, as was rehearsed under ZeRO-3 with bitsandbytes' 8-bit
    AdamW (tests/rehearse/published.jsonl): in bf16, on the card, with reentrant checkpoints; by its kernels where no weights
    wait to be read again, as axolotl's files say."""
    setup, distributed = job.setup, job.distributed
    own = setup.by.own_fsdp2 and all(name.startswith("axolotl.") for name in setup.kernels or ())
    plain = job.quant is None and setup.dtype == setup.autocast == "bf16" and job.architecture.model_type == "llama"
    on_card = distributed is not None and {distributed.offload_params, distributed.offload_optimizer} <= {None, "none"}
    sizes = distributed and (distributed.stage3_max_live_parameters, distributed.stage3_max_reuse_distance)
    shown = not setup.kernels or sizes == (0, 0)
    checkpointed = bool(setup.gradient_checkpointing) and setup.use_reentrant
    return own and job.method_name == "lora" and plain and on_card and shown and checkpointed


def is_shown_trainer(job: Job) -> bool:
    """Whether accelerate prepares the model, or the loop was rehearsed with this strategy."""
    assert job.distributed is not None
    by, strategy = job.setup.by, job.distributed.strategy
    apart = strategy == "fsdp2" or (strategy == "zero3" and by.weighs_tokens)
    return by.prepares_model or (by.layout is not ACCELERATE and apart)


def is_shown_reentrant(job: Job) -> bool:
    """Whether reentrant checkpoints were rehearsed with this strategy: under FSDP2 those between the hooks of a layer, under
    ZeRO-3 in a step of one forward, of experts that do not train or of which nothing is gathered ahead, and of an adapter whose
    trainer generates."""
    assert job.distributed is not None
    strategy = job.distributed.strategy
    if strategy == "fsdp2":
        return job.script.checkpoints_forward and job.setup.by.layout is ACCELERATE
    if strategy == "zero3":
        trains_experts = (
            job.method_name == "full" and job.architecture.model_type in LEAVES and not job.setup.by.gathers_when_called
        )
        writes_with_adapter = job.setup.by.generates and job.method_name == "lora"
        rehearsed = job.setup.by.reentrant or writes_with_adapter or not job.setup.by.of_preferences
        return not trains_experts and rehearsed
    return strategy != "zero0" or job.setup.by.anchors or bool(job.setup.by.under_zero0)


STORED = {"fsdp2": "bf16", "zero3": "uint8"}
"""Strategy → the dtype of packed weights beside which Adagrad and BOFT were rehearsed (optimizers.jsonl, methods.jsonl)."""


def packs_on_card(job: Job, *, whole: bool = False) -> bool:
    """Whether ranks divide 4 bits that were packed so on the card beside an adapter in fp32, or, if `whole`, hold all of them."""
    assert job.quant is not None
    assert job.distributed is not None
    shown = (STORED.get(job.distributed.strategy), "uint8" if whole and job.distributed.strategy == "fsdp2" else None)
    stored = job.quant.name == "nf4" and job.quant.quant_storage in shown
    on_card = job.setup.device_map != "cpu" and not job.distributed.cpu_ram_efficient_loading
    return stored and on_card and (job.setup.dtype, job.setup.adapter_dtype) == ("bf16", "fp32")


def packs_in_fp32(job: Job) -> bool:
    """Whether QLoRA under FSDP1 over 4 bits that are stored in fp32, as kbit preparation casts norms, was rehearsed: by Trainer,
    whose units are then gathered in fp32, with checkpoints and all on the card (tests/rehearse/methods.jsonl)."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    stored = job.quant is not None and (job.quant.name, job.quant.quant_storage) == ("nf4", "fp32")
    on_card = distributed.offload_params in (None, "none") and distributed.use_orig_params is not False
    of_lora = job.method_name == "qlora" and is_bare(job) and getattr(job.config, "bias", "none") == "none"
    checkpointed = setup.gradient_checkpointing and not setup.use_reentrant
    plain = setup.autocast == "bf16" and setup.adapter_dtype == "fp32" and setup.loss == "full"
    return stored and on_card and of_lora and plain and bool(checkpointed) and knows_methods(job)


ADAPTED_LEAVES = ("mixtral", "qwen3_moe")
"""Model types whose experts, a module without hooks inside, were rehearsed with LoRA over their stacks and router."""


def adapts_leaves(job: Job) -> bool:
    """Whether LoRA over such experts under ZeRO-3 resembles what was rehearsed: by Trainer in 16 bits, all on the card, without
    reentrant checkpoints (tests/distributed/rank_jobs.jsonl, tests/rehearse/unreserved.jsonl)."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    on_card = {distributed.offload_params, distributed.offload_optimizer} <= {None, "none"} and not distributed.keeps_leftovers
    reentrant = bool(setup.gradient_checkpointing and setup.use_reentrant)
    plain = setup.dtype == setup.autocast == "bf16" and setup.loss == "full" and not setup.kernels
    of_type = job.architecture.model_type in ADAPTED_LEAVES and job.method_name == "lora" and job.quant is None and is_bare(job)
    return of_type and plain and on_card and not reentrant and setup.by.traced_on_ranks and not setup.by.of_preferences


def scans_under_zero2(job: Job) -> bool:
    """Whether LoRA of Nemotron 3's attention trains under ZeRO-2 as was rehearsed by ms-swift (tests/rehearse/swift.jsonl): one
    row, in bf16 with reentrant checkpoints, and routers without a loss."""
    setup, distributed = job.setup, job.distributed
    if distributed is None or distributed.strategy != "zero2" or job.architecture.model_type != "nemotron_h":
        return False
    on_card = {distributed.offload_params, distributed.offload_optimizer} <= {None, "none"}
    of_attention = job.method_name == "lora" and all(module.name.endswith(OF_ATTENTION) for module in job.adaptation.matched)
    narrow = setup.dtype == setup.autocast == "bf16" and job.quant is None and setup.loss == "full" and not setup.padding
    checkpoints = bool(setup.gradient_checkpointing) and bool(setup.use_reentrant) and setup.batch_size == 1
    plain = setup.trainer == DEFAULT and setup.attn_implementation == "flash_attention_2" and setup.router_loss is False
    return on_card and of_attention and narrow and checkpoints and plain and is_bare(job) and setup.kernels in (None, SCAN)


def layer_classes(job: Job) -> tuple[str, ...]:
    """The name of the class of the model's layers."""
    stem = job.architecture.model_class.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    return (f"{stem}DecoderLayer",)


def classifies(job: Job) -> bool:
    """Whether the model is an encoder under DeepSpeed that classifies sequences, fully trained or with LoRA.

    Under ZeRO-3 DeepSpeed refuses LoRA beside a head that trains: an adapter in fp32 and a head in 16 bits
    (runtime/zero/utils.py, `defragment`).
    """
    assert job.distributed is not None
    known = job.distributed.strategy in ZERO and job.architecture.model_type in CLASSIFIERS_UNDER_DEEPSPEED
    methods = ("full",) if job.distributed.strategy == "zero3" else ("full", "lora")
    return known and job.architecture.task_type == "SEQ_CLS" and job.method is not None and job.method.name in methods


def scores_text(job: Job) -> bool:
    """Whether the text part of a vision-language model scores sequences as was rehearsed with ms-swift: with LoRA over 16 bits on
    one GPU, or under ZeRO-2 (tests/rehearse/swift.jsonl)."""
    by, strategy = job.setup.by, None if job.distributed is None else job.distributed.strategy
    by_swift = by.shows_picture and not by.of_preferences and strategy in (None, "zero2")
    plain = job.method_name == "lora" and job.quant is None and job.setup.dtype == job.setup.autocast == "bf16"
    return by_swift and plain and job.architecture.has_towers and job.architecture.task_type == "SEQ_CLS"


def translates_text(job: Job) -> bool:
    """Whether the model is an encoder-decoder that NeMo Automodel trains in full under FSDP2."""
    fits = job.setup.by.layout is AUTOMODEL and job.distributed is not None and job.distributed.strategy == "fsdp2"
    return fits and job.architecture.model_type == "t5" and job.method_name == "full"


def is_decoder(job: Job) -> bool:
    """Whether the model is a plain decoder whose steps were rehearsed: embedding, layers, final norm, head."""
    architecture = job.architecture
    forward = (FORWARDS | OF_TEXT_PARTS).get(architecture.model_type) or builds(job)
    mixes = (has_own_code(job) or builds(job)) and job.setup.by.layout is AUTOMODEL
    by_deepspeed = job.distributed is not None and job.distributed.strategy in ZERO
    mixes = mixes or (by_deepspeed and architecture.model_type in CONVOLVING)
    decoders = architecture.blocks and all(
        b.stack == "decoder" and (b.attentions or b.delta_rule or mixes) for b in architecture.blocks
    )
    rehearsed = not by_deepspeed or architecture.model_type in UNDER_DEEPSPEED
    return scans_under_zero2(job) or bool(forward and decoders and architecture.input_embedding and rehearsed)
