"""The options of other tools as types, which `job.options` and `job.grid_options` take in."""

from __future__ import annotations

from typing_extensions import TypedDict


class OtherWords(TypedDict, total=False):
    """Option names of other tools (`job.words`)."""

    finetuning_type: object
    train_type: object
    tuner_type: object
    peft_type: object
    adapter: object
    rank: object
    lora_r: object
    lora_rank: object
    lora_target_modules: object
    lora_target: object
    lora_target_linear: object
    lora_modules_to_save: object
    additional_target: object
    lora_task_type: object
    peft_use_dora: object
    lora_use_dora: object
    peft_use_rslora: object
    lora_use_rslora: object
    max_length: object
    max_seq_length: object
    max_seq_len: object
    sequence_len: object
    sequence_length: object
    seq_length: object
    cutoff_len: object
    model_max_length: object
    per_device_train_batch_size: object
    per_gpu_train_batch_size: object
    micro_batch_size: object
    mbs: object
    bs: object
    train_micro_batch_size_per_gpu: object
    gradient_accumulation: object
    grad_accum: object
    accumulation_steps: object
    gas: object
    load_in_4bit: object
    load_in_8bit: object
    quantization_bit: object
    bits: object
    bnb_4bit_quant_type: object
    quantization_type: object
    bnb_4bit_use_double_quant: object
    use_bnb_nested_quant: object
    double_quantization: object
    bnb_4bit_compute_dtype: object
    torch_dtype: object
    model_dtype: object
    bf16: object
    fp16: object
    mixed_precision: object
    bnb_4bit_quant_storage: object
    num_gpus: object
    nproc_per_node: object
    n_gpu: object
    nnodes: object
    num_machines: object
    num_nodes: object
    tensor_parallel_size: object
    nproc: object
    num_processes: object
    world_size: object
    tp: object
    cp: object
    ep: object
    expert_parallel_size: object
    pp: object
    pipeline_parallel_size: object
    zero_stage: int | str | None
    quantization: int | str | None
    neftune_noise_alpha: float | None
    context_parallel_size: object
    hybrid_shard_size: object
    offload_param: object
    fsdp_offload_params: object
    offload_optimizer_device: object
    optimizer: object
    use_gradient_checkpointing: object
    activation_checkpointing: object
    enable_activation_checkpointing: object
    flash_attn: object
    flash_attention: object
    use_flash_attn: object
    use_flash_attention_2: object
    attn_impl: object
    use_liger_kernel: object
    enable_liger_kernel: object
    cut_cross_entropy: object
    use_liger: object
