"""The options of `sweep` as types: one value of each, or several. `python -m tools.grid_options` writes this file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, TypeVar

from peftplan.distributed.names import Place, Prefetch, Schedule, StrategyName, WrapPolicy
from peftplan.job.other_words import OtherWords
from peftplan.job.script import Script
from peftplan.job.trainer_words import Autocast, DeviceMap, Loss, TrainerName

T = TypeVar("T")
Axis: TypeAlias = T | Iterable[T] | str
"""A value as `estimate` takes it, a list, array or range of values, or text such as `1,2,4` and `512:8192:512`."""


class GridOptions(OtherWords, total=False):
    """Options of a grid."""

    batch_size: Axis[int]
    seq_len: Axis[int]
    r: Axis[int]
    trainer: Axis[TrainerName]
    tool_version: Axis[str | None]
    task_type: Axis[str | None]
    num_labels: Axis[int | None]
    quant: Axis[str | None]
    double_quant: Axis[bool | None]
    quant_bits: Axis[int | None]
    quant_group_size: Axis[int | None]
    quant_blocksize: Axis[int | None]
    quant_skip_modules: Axis[str | Iterable[str] | None]
    quant_experts: Axis[bool | None]
    quant_storage: Axis[str | None]
    compute_dtype: object
    dtype: object
    adapter_dtype: object
    device_map: Axis[DeviceMap | None]
    autocast: Axis[Autocast | None]
    optim: Axis[str | None]
    optim_args: Axis[str | None]
    optim_target_modules: Axis[str | Iterable[str] | None]
    optimizer_in_backward: Axis[bool | None]
    eval_batch_size: Axis[int | None]
    gradient_accumulation_steps: Axis[int]
    gradient_checkpointing: Axis[bool | None]
    use_reentrant: Axis[bool]
    every_n_layers: Axis[int | None]
    offload_checkpoints: Axis[bool | None]
    noisy_embeddings: Axis[bool | None]
    expandable_segments: Axis[bool | None]
    attn_implementation: Axis[Literal["sdpa", "eager", "flash_attention_2"] | None]
    kernels: Axis[str | Iterable[str] | None]
    loss: Axis[Loss]
    logits_to_keep: Axis[int | None]
    router_loss: Axis[bool | None]
    max_completion_length: Axis[int | None]
    teacher_model: Axis[str | None]
    reward_model: Axis[str | None]
    precompute_ref_log_probs: Axis[bool | None]
    beta: Axis[float | None]
    loss_type: Axis[str | None]
    max_prompt_length: Axis[int | None]
    num_generations: Axis[int | None]
    steps_per_generation: Axis[int | None]
    n_passages: Axis[int | None]
    tool_turns: Axis[bool | None]
    rollout_batch_size: Axis[int | None]
    mtp_depths: Axis[int | None]
    use_vllm: Axis[bool | None]
    vllm_mode: Axis[Literal["colocate", "server"] | None]
    vllm_gpu_memory_utilization: Axis[float | None]
    vllm_enable_sleep_mode: Axis[bool | None]
    move_model_batches: Axis[int | None]
    padding: Axis[bool]
    keep_outputs: Axis[bool | None]
    keep_gradients: Axis[bool]
    clip_gradients: Axis[bool | None]
    kbit_prepare: Axis[bool | None]
    narrow_tables: Axis[bool | None]
    use_cache: Axis[bool | None]
    save_total_limit: Axis[int | None]
    host_memory: Axis[int | str | None]
    trust_remote_code: Axis[bool]
    accelerate_config: Axis[str | os.PathLike[str] | Mapping[str, object] | None]
    deepspeed: Axis[str | os.PathLike[str] | Mapping[str, object] | None]
    strategy: Axis[StrategyName | None]
    gpus: Axis[int | None]
    nodes: Axis[int | None]
    accelerate: Axis[str | None]
    deepspeed_version: Axis[str | None]
    reshard_after_forward: Axis[bool | int | None]
    dp_shard_size: Axis[int | None]
    offload_params: Axis[Place | None]
    wrap_policy: Axis[WrapPolicy | None]
    transformer_cls_names_to_wrap: Axis[str | Iterable[str] | None]
    min_num_params: Axis[int | None]
    custom_sharded_layers: Axis[str | Iterable[str] | None]
    backward_prefetch: Axis[Prefetch | None]
    forward_prefetch: Axis[bool | None]
    use_orig_params: Axis[bool | None]
    cpu_ram_efficient_loading: Axis[bool | None]
    sync_each_batch: Axis[bool | None]
    checkpoints_parts: Axis[bool | None]
    param_dtype: object
    reduce_dtype: object
    bucket_cap_mb: Axis[float | None]
    gradient_as_bucket_view: Axis[bool | None]
    find_unused_parameters: Axis[bool | None]
    static_graph: Axis[bool | None]
    offload_optimizer: Axis[Place | None]
    overlap_comm: Axis[bool | None]
    contiguous_gradients: Axis[bool | None]
    reduce_scatter: Axis[bool | None]
    round_robin_gradients: Axis[bool | None]
    reduce_bucket_size: Axis[int | Literal["auto"] | None]
    allgather_bucket_size: Axis[int | None]
    sub_group_size: Axis[int | None]
    stage3_prefetch_bucket_size: Axis[int | Literal["auto"] | None]
    stage3_param_persistence_threshold: Axis[int | Literal["auto"] | None]
    stage3_max_live_parameters: Axis[int | None]
    stage3_max_reuse_distance: Axis[int | None]
    zero3_init: Axis[bool | None]
    deepspeed_optimizer: Axis[bool | None]
    zero_force_ds_cpu_optimizer: Axis[bool | None]
    tp_size: Axis[int | None]
    cp_size: Axis[int | None]
    sp_size: Axis[int | None]
    seq_parallel_communication_data_type: Axis[str | None]
    ep_size: Axis[int | None]
    routing: Axis[str | None]
    pp_size: Axis[int | None]
    pp_schedule: Axis[Schedule | None]
    pp_microbatches: Axis[int | None]
    pp_layers_per_stage: Axis[int | None]
    pp_round_stages: Axis[Literal["up", "down"] | None]
    pp_stage_is_unit: Axis[bool | None]
    whole_tower: Axis[bool | None]
    alpha: object
    alpha_pattern: object
    beta1: object
    beta2: object
    bias: Axis[str]
    block_share: Axis[bool]
    boft_block_num: Axis[int]
    boft_block_size: Axis[int]
    boft_dropout: Axis[float]
    boft_n_butterfly_factor: Axis[int]
    bottleneck_size: Axis[int | None]
    coft: Axis[bool]
    corda_config: object
    d_initial: object
    decompose_both: Axis[bool]
    decompose_factor: Axis[int]
    deltaT: Axis[int]
    encoder_dropout: Axis[float]
    encoder_hidden_size: Axis[int | None]
    encoder_num_layers: Axis[int]
    encoder_reparameterization_type: Axis[Literal["MLP", "LSTM"]]
    ensure_weight_tying: Axis[bool]
    eps: object
    eva_config: object
    exclude_modules: Axis[str | Iterable[str] | None]
    fan_in_fan_out: object
    feedforward_modules: Axis[str | Iterable[str] | None]
    freeze_a: Axis[bool]
    freeze_adapter: Axis[bool]
    init_ia3_weights: object
    init_lora_weights: Axis[bool | str]
    init_r: Axis[int]
    init_weights: object
    layers_pattern: Axis[str | Iterable[str] | None]
    layers_to_transform: Axis[int | Iterable[int] | None]
    loftq_config: object
    lora_alpha: Axis[float | None]
    lora_bias: Axis[bool]
    lora_dropout: Axis[float]
    lora_ga_config: object
    megatron_core: object
    module_dropout: Axis[float]
    modules_to_save: Axis[str | Iterable[str] | None]
    n_frequency: Axis[int]
    n_frequency_pattern: Axis[Mapping[str, int]]
    n_layers: Axis[int]
    num_attention_heads: Axis[int | None]
    num_cayley_neumann_terms: Axis[int]
    num_groups: Axis[int | None]
    num_layers: Axis[int | None]
    num_new_blocks: Axis[int]
    num_transformer_submodules: Axis[int | None]
    num_virtual_tokens: Axis[int]
    oft_block_size: Axis[int]
    orth_reg_weight: object
    prefix_projection: Axis[bool]
    projection_prng_key: object
    prompt_tuning_init: object
    prompt_tuning_init_text: object
    qalora_group_size: object
    random_loc_seed: object
    rank_dropout: Axis[float]
    rank_dropout_scale: object
    rank_pattern: Axis[Mapping[str, int]]
    reduction_factor: Axis[float]
    runtime_config: object
    save_projection: object
    scaling: object
    target_modules: Axis[str | Iterable[str] | None]
    target_parameters: Axis[str | Iterable[str] | None]
    target_r: Axis[int]
    tfinal: Axis[int]
    tinit: Axis[int]
    token_dim: Axis[int | None]
    tokenizer_kwargs: object
    tokenizer_name_or_path: object
    total_step: Axis[int | None]
    trainable: Axis[str | Iterable[str] | None]
    trainable_dtype: Axis[Literal["fp32"] | None]
    trainable_layers: Axis[int]
    trainable_token_indices: Axis[Iterable[int] | Mapping[str, Iterable[int]] | None]
    use_cayley_neumann: Axis[bool]
    use_dora: Axis[bool]
    use_effective_conv2d: object
    use_rslora: Axis[bool]
    vera_dropout: Axis[float]
    method: Axis[str | None]
    peft_config: object
    quantization_config: object
    training_args: object
    script: Axis[Script]
    strict: Axis[bool]
