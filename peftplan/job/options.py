"""The options of `estimate`, `fit`, `compare` and `serving` as types, so that a type checker reports a wrong keyword.

`python -m tools.grid_options` writes those of `sweep` from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal

from typing_extensions import TypedDict

from peftplan.distributed.names import Place, Prefetch, Schedule, StrategyName, WrapPolicy
from peftplan.job.other_words import OtherWords
from peftplan.job.script import Script
from peftplan.job.trainer_words import Autocast, DeviceMap, Loss, TrainerName


class SizeOptions(TypedDict, total=False):
    """Sizes, which `sweep` evaluates as arrays."""

    batch_size: int
    seq_len: int
    r: int


class SetupOptions(TypedDict, total=False):
    """Options that `job.setup.Setup` checks, without sizes."""

    trainer: TrainerName
    tool_version: str | None
    task_type: str | None
    num_labels: int | None
    quant: str | None
    double_quant: bool | None
    quant_bits: int | None
    quant_group_size: int | None
    quant_blocksize: int | None
    quant_skip_modules: str | Iterable[str] | None
    quant_experts: bool | None
    quant_storage: str | None
    compute_dtype: object
    dtype: object
    adapter_dtype: object
    device_map: DeviceMap | None
    autocast: Autocast | None
    optim: str | None
    optim_args: str | None
    optim_target_modules: str | Iterable[str] | None
    optimizer_in_backward: bool | None
    eval_batch_size: int | None
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | None
    use_reentrant: bool
    every_n_layers: int | None
    offload_checkpoints: bool | None
    noisy_embeddings: bool | None
    expandable_segments: bool | None
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None
    kernels: str | Iterable[str] | None
    loss: Loss
    logits_to_keep: int | None
    router_loss: bool | None
    max_completion_length: int | None
    teacher_model: str | None
    reward_model: str | None
    precompute_ref_log_probs: bool | None
    beta: float | None
    loss_type: str | None
    max_prompt_length: int | None
    num_generations: int | None
    steps_per_generation: int | None
    n_passages: int | None
    tool_turns: bool | None
    rollout_batch_size: int | None
    mtp_depths: int | None
    use_vllm: bool | None
    vllm_mode: Literal["colocate", "server"] | None
    vllm_gpu_memory_utilization: float | None
    vllm_enable_sleep_mode: bool | None
    move_model_batches: int | None
    padding: bool
    keep_outputs: bool | None
    keep_gradients: bool
    clip_gradients: bool | None
    kbit_prepare: bool | None
    narrow_tables: bool | None
    use_cache: bool | None
    save_total_limit: int | None
    host_memory: int | str | None
    trust_remote_code: bool


class StrategyOptions(TypedDict, total=False):
    """Options that `distributed.strategy.Distributed` checks, and launch files that set them (`job.launch`)."""

    accelerate_config: str | os.PathLike[str] | Mapping[str, object] | None
    deepspeed: str | os.PathLike[str] | Mapping[str, object] | None
    strategy: StrategyName | None
    gpus: int | None
    nodes: int | None
    accelerate: str | None
    deepspeed_version: str | None
    reshard_after_forward: bool | int | None
    dp_shard_size: int | None
    offload_params: Place | None
    wrap_policy: WrapPolicy | None
    transformer_cls_names_to_wrap: str | Iterable[str] | None
    min_num_params: int | None
    custom_sharded_layers: str | Iterable[str] | None
    backward_prefetch: Prefetch | None
    forward_prefetch: bool | None
    use_orig_params: bool | None
    cpu_ram_efficient_loading: bool | None
    sync_each_batch: bool | None
    checkpoints_parts: bool | None
    param_dtype: object
    reduce_dtype: object
    bucket_cap_mb: float | None
    gradient_as_bucket_view: bool | None
    find_unused_parameters: bool | None
    static_graph: bool | None
    offload_optimizer: Place | None
    overlap_comm: bool | None
    contiguous_gradients: bool | None
    reduce_scatter: bool | None
    round_robin_gradients: bool | None
    reduce_bucket_size: int | Literal["auto"] | None
    allgather_bucket_size: int | None
    sub_group_size: int | None
    stage3_prefetch_bucket_size: int | Literal["auto"] | None
    stage3_param_persistence_threshold: int | Literal["auto"] | None
    stage3_max_live_parameters: int | None
    stage3_max_reuse_distance: int | None
    zero3_init: bool | None
    deepspeed_optimizer: bool | None
    zero_force_ds_cpu_optimizer: bool | None
    tp_size: int | None
    cp_size: int | None
    sp_size: int | None
    seq_parallel_communication_data_type: str | None
    ep_size: int | None
    routing: str | None
    pp_size: int | None
    pp_schedule: Schedule | None
    pp_microbatches: int | None
    pp_layers_per_stage: int | None
    pp_round_stages: Literal["up", "down"] | None
    pp_stage_is_unit: bool | None
    whole_tower: bool | None


class MethodOptions(TypedDict, total=False):
    """Fields of the methods under peft's names (`peftplan methods NAME`). An `object` is not looked at: it changes no tensor."""

    alpha: object
    alpha_pattern: object
    beta1: object
    beta2: object
    bias: str
    block_share: bool
    boft_block_num: int
    boft_block_size: int
    boft_dropout: float
    boft_n_butterfly_factor: int
    bottleneck_size: int | None
    coft: bool
    corda_config: object
    d_initial: object
    decompose_both: bool
    decompose_factor: int
    deltaT: int
    encoder_dropout: float
    encoder_hidden_size: int | None
    encoder_num_layers: int
    encoder_reparameterization_type: Literal["MLP", "LSTM"]
    ensure_weight_tying: bool
    eps: object
    eva_config: object
    exclude_modules: str | Iterable[str] | None
    fan_in_fan_out: object
    feedforward_modules: str | Iterable[str] | None
    freeze_a: bool
    freeze_adapter: bool
    init_ia3_weights: object
    init_lora_weights: bool | str
    init_r: int
    init_weights: object
    layers_pattern: str | Iterable[str] | None
    layers_to_transform: int | Iterable[int] | None
    loftq_config: object
    lora_alpha: float | None
    lora_bias: bool
    lora_dropout: float
    lora_ga_config: object
    megatron_core: object
    module_dropout: float
    modules_to_save: str | Iterable[str] | None
    n_frequency: int
    n_frequency_pattern: Mapping[str, int]
    n_layers: int
    num_attention_heads: int | None
    num_cayley_neumann_terms: int
    num_groups: int | None
    num_layers: int | None
    num_new_blocks: int
    num_transformer_submodules: int | None
    num_virtual_tokens: int
    oft_block_size: int
    orth_reg_weight: object
    prefix_projection: bool
    projection_prng_key: object
    prompt_tuning_init: object
    prompt_tuning_init_text: object
    qalora_group_size: object
    random_loc_seed: object
    rank_dropout: float
    rank_dropout_scale: object
    rank_pattern: Mapping[str, int]
    reduction_factor: float
    runtime_config: object
    save_projection: object
    scaling: object
    target_modules: str | Iterable[str] | None
    target_parameters: str | Iterable[str] | None
    target_r: int
    tfinal: int
    tinit: int
    token_dim: int | None
    tokenizer_kwargs: object
    tokenizer_name_or_path: object
    total_step: int | None
    trainable: str | Iterable[str] | None
    trainable_dtype: Literal["fp32"] | None
    trainable_layers: int
    trainable_token_indices: Iterable[int] | Mapping[str, Iterable[int]] | None
    use_cayley_neumann: bool
    use_dora: bool
    use_effective_conv2d: object
    use_rslora: bool
    vera_dropout: float


class Options(SizeOptions, SetupOptions, StrategyOptions, MethodOptions, OtherWords, total=False):
    """All of them."""


class JobOptions(Options, total=False):
    """Options that `fit` and `compare` pass on to `estimate`."""

    method: str | None
    peft_config: object
    quantization_config: object
    training_args: object
    context: float | None
    script: Script
    strict: bool
