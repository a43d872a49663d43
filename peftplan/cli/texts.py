"""The options of a job by group, under the ecosystem's names: the help of each, and its value."""

from __future__ import annotations

from typing import get_args

from peftplan.distributed.names import Place, Prefetch, Schedule, StrategyName, WrapPolicy
from peftplan.job.trainer_words import Autocast, DeviceMap, Loss, TrainerName

WIDEST_GROUP = 40
"""Letters of a group of names. A wider one would break inside a name at 80 columns."""


def by_tool(names: tuple[str, ...], *, brief: bool = False) -> str:
    """Names that share a beginning or an end in groups: `swift-dpo|kto`, `trl[-dpo|kto]` where `trl` is a name too,
    `[unsloth-]sentence-transformers`. `brief`: of each beginning one group alone."""
    widest = WIDEST_GROUP - len("|…,") if brief else WIDEST_GROUP
    longer = {name: end for name in names if "-" in (end := name.partition("-")[2]) and end in names}
    tools: dict[str, list[str]] = {}
    for name in names:
        if name not in longer:
            tool, _, kind = name.partition("-")
            tools.setdefault(tool, []).append(kind)
    texts = []
    for tool, kinds in tools.items():
        named = [kind for kind in kinds if kind]
        groups: list[str] = []
        for kind in named:
            if groups and len(f"{tool}-{groups[-1]}|{kind}") <= widest:
                groups[-1] += f"|{kind}"
            else:
                groups.append(kind)
        if brief and len(groups) > 1:
            groups = [f"{groups[0]}|…"]
        if "" in kinds:
            texts.append(f"{tool}[-{groups.pop(0)}]" if groups else tool)
        texts += [f"{tool}-{group}" for group in groups]
    before = {other: name.removesuffix(other) for name, other in longer.items()}
    return ", ".join(f"[{before[text]}]{text}" if text in before else text for text in texts)


METHOD: dict[str, str] = {
    "--method": "see `peftplan methods`; default: lora",
    "--peft-config": "a peft adapter_config.json of any method",
    "--r": "rank; default: the method's (8 for LoRA)",
    "--lora-alpha": "scaling of the update",
    "--lora-dropout": "dropout before A",
    "--target-modules": "names, a pattern, or all-linear | every-linear | linear-names | attention | mlp | peft-default",
    "--exclude-modules": "modules left out: names or a regular expression",
    "--target-parameters": "parameters adapted directly, such as fused experts",
    "--modules-to-save": "modules trained in full beside the adapter",
    "--layers-to-transform": "layer indices, comma-separated",
    "--rank-pattern": 'rank per module, JSON: {"q_proj": 4}',
    "--bias": "which biases train",
    "--num-virtual-tokens": "virtual tokens of prefix, prompt and p-tuning",
    "--use-dora/--no-use-dora": "DoRA on top of LoRA",
    "--use-rslora/--no-use-rslora": "scale by alpha / sqrt(r)",
    "--set": "any other field of the method's config; repeatable",
}
MODEL: dict[str, str] = {
    "--task-type": "peft's task type: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, …; default: from the config",
    "--num-labels": "classes of a classification head",
    "--trust-remote-code/--no-trust-remote-code": "accepted for compatibility; remote code is never run",
}
STORAGE: dict[str, str] = {
    "--dtype": "dtype of the base model, auto: its checkpoint's; default: bf16",
    "--device-map": "how from_pretrained places the model on one GPU, default: the trainer's (auto for TRL with a model name); "
    "under FSDP2, cpu packs 4-bit weights on the host, and each GPU gets its shards",
    "--adapter-dtype": "dtype of the adapter; peft's default is fp32",
    "--autocast": "dtype of autocast; default: the trainer's",
    "--quant": "storage of the base; default: the method's",
    "--quant-bits": "bits of gptq and hqq",
    "--quant-group-size": "group size of gptq, awq and hqq",
    "--quant-blocksize": "block size of nf4 and fp4",
    "--quant-skip-modules": "modules left unquantized, comma-separated (replaces the default list)",
    "--quant-experts/--no-quant-experts": "store fused experts as nf4, fp4 or int8 too (axolotl: quantize_moe_experts)",
    "--quant-storage": "storage dtype of packed nf4 and fp4 weights; FSDP shards only floats",
    "--double-quant/--no-double-quant": "double quantization of nf4 and fp4",
    "--compute-dtype": "compute dtype of 4-bit layers",
    "--kbit-prepare/--no-kbit-prepare": "call prepare_model_for_kbit_training on a quantized base",
}
TRAINING: dict[str, str] = {
    "--trainer": f"{by_tool(get_args(TrainerName))}; default: transformers",
    "--batch-size": "sequences per device and micro batch; default: the trainer's minimum, mostly 1",
    "--seq-len": "tokens per sequence; default: up to 2048",
    "--gradient-accumulation-steps": "micro batches per optimizer step; default: 1",
    "--gradient-checkpointing/--no-gradient-checkpointing": "recompute each decoder layer in backward",
    "--every-n-layers": "checkpoint only every n-th layer",
    "--noisy-embeddings/--no-noisy-embeddings": "add noise to the embeddings (NEFTune: neftune_noise_alpha)",
    "--expandable-segments/--no-expandable-segments": "torch's allocator uses expandable segments (PYTORCH_ALLOC_CONF)",
    "--offload-checkpoints/--no-offload-checkpoints": "keep the inputs of checkpointed layers in host memory",
    "--use-reentrant/--no-use-reentrant": "reentrant checkpointing (older default of transformers and peft)",
    "--host-memory": "host memory of a node, such as 512GiB; offloaded tensors have to fit there",
    "--save-total-limit": "checkpoints that Trainer keeps on disk (-v and JSON show their size)",
    "--optim": "a name of TrainingArguments.optim",
    "--optim-args": "as in TrainingArguments",
    "--optim-target-modules": "modules that GaLore and APOLLO project",
    "--optimizer-in-backward/--no-optimizer-in-backward": "update each parameter as soon as its gradient is ready (torchtune)",
    "--attn-implementation": "attention kernels; default: sdpa if the model supports it",
    "--kernels": "kernels that replace the model's: unsloth, unsloth-compiled, unsloth-tiled, unsloth-rows, unsloth-function, "
    "unsloth-padded, unsloth-offload, unsloth-experts, unsloth-qat-int4|int8-int4|lora, axolotl, axolotl-fused, "
    "axolotl-offload, trl-offload, swift-offload, liger, torchao (QAT), torchao-int4, torchao-mxfp4, torchao-float8, te, "
    "mamba-ssm, fla, deepep, deepep-again, hybridep, uccl, balanced, te-linear, te-experts, te-mxfp8, te-fp8, "
    "te-fp8-blocks, te-norm, torch-norm, torch-lora, torch-compile, torch-compile-attn, quack, quack-linear, or parts of them",
    "--loss": f"how the loss is computed: {', '.join(get_args(Loss))}; default: auto, the trainer's",
    "--logits-to-keep": "compute logits only for the last N tokens of each sequence",
    "--router-loss/--no-router-loss": "add a mixture's load-balancing loss; default: as the trainer or the config says",
    "--mtp-depths": "further tokens that NeMo Automodel's Nemotron 3 predicts at each position; default: as the config says",
    "--padding/--no-padding": "padded batches, which need an attention mask",
    "--use-cache/--no-use-cache": "build a KV cache in training",
    "--keep-outputs/--drop-outputs": "keep the model's outputs alive through backward and step",
    "--clip-gradients/--no-clip-gradients": "clip the norm of the gradients before a step; default: as the trainer does",
    "--narrow-tables/--no-narrow-tables": "cast the prepared embedding and head back to bf16, as earlier SFTTrainers; with nf4",
    "--keep-gradients/--drop-gradients": "keep gradients allocated between steps (zero_grad(set_to_none=False))",
}
PREFERENCES: dict[str, str] = {
    "--max-completion-length": "tokens per completion, the scored part of a sequence; default: all but the first",
    "--teacher-model": "model that the student learns from; not quantized, in the student's dtype",
    "--reward-model": "model that scores completions; not quantized, in the policy's dtype",
    "--precompute-ref-log-probs/--no-precompute-ref-log-probs": "run the reference model before training",
    "--beta": "weight of the reference model; in GKD and GOLD, the teacher's share of the mixture (0 and 1: no mixture)",
    "--loss-type": "the trainer's own name of its loss",
    "--max-prompt-length": "tokens per prompt, instead of --seq-len",
    "--num-generations": "completions per prompt",
    "--n-passages": "passages of each query",
    "--steps-per-generation": "micro batches whose completions are generated at once; default: those of one step",
    "--tool-turns/--no-tool-turns": "tools answer completions, after which the policy goes on",
    "--eval-batch-size": "rows of an evaluation between steps, of --seq-len tokens; default: nothing is evaluated",
    "--rollout-batch-size": "completions that PPO writes and scores at once; default: 64",
    "--use-vllm/--no-use-vllm": "generate completions with vLLM instead of transformers",
    "--vllm-mode": "vLLM on the training GPUs, or a server elsewhere; default: colocate",
    "--vllm-gpu-memory-utilization": "share of the card for vLLM; default: 0.3",
    "--vllm-enable-sleep-mode/--no-vllm-enable-sleep-mode": "vLLM releases its memory while the policy trains",
    "--move-model-batches": "groups of layers in which ms-swift gathers weights for vLLM; default: all at once",
}
GPUS: dict[str, str] = {
    "--gpus": "GPUs per node; --gpu 8xCARD sets it too",
    "--nodes": "nodes of --gpus GPUs each; default: 1",
    "--strategy": "how the GPUs share the job; default: ddp",
    "--accelerate-config": "an accelerate config file (YAML)",
    "--deepspeed": "a DeepSpeed config file (JSON); auto is filled in as by transformers",
    "--tool-version": "release of the training tool; axolotl before 0.21 loads and checkpoints differently, has FSDP1",
    "--accelerate": "accelerate release that prepares the model; before 1.14 FSDP2 differs, before 0.30 FSDP1 casts nothing",
    "--deepspeed-version": "DeepSpeed release that runs ZeRO-3; before 0.19.3 it keeps weights that no hook releases",
    "--reshard-after-forward": "FSDP: free gathered weights after forward; true, false, or a number of ranks",
    "--dp-shard-size": "FSDP: ranks per shard group; the groups are replicas (HSDP)",
    "--offload-params": "keep the shards in host memory",
    "--offload-optimizer": "DeepSpeed: keep fp32 masters and optimizer states in host memory",
    "--param-dtype": "FSDP: dtype of gathered weights; default: --autocast",
    "--reduce-dtype": "FSDP: dtype of gradient reduction; default: that of gathered weights",
    "--wrap-policy": "FSDP: what becomes a unit",
    "--transformer-cls-names-to-wrap": "FSDP: classes of layers that become units; default: the model's own",
    "--min-num-params": "FSDP: minimum parameters of a unit with --wrap-policy size",
    "--backward-prefetch": "FSDP1: when the next unit is gathered in backward",
    "--forward-prefetch/--no-forward-prefetch": "FSDP1: gather the next unit early in forward; FSDP2 with "
    "trainer automodel: gather layers early, in backward too",
    "--use-orig-params/--no-use-orig-params": "FSDP1: the optimizer steps over views of the flat parameters",
    "--cpu-ram-efficient-loading/--no-cpu-ram-efficient-loading": "only rank 0 loads the model; the others get shards",
    "--sync-each-batch/--no-sync-each-batch": "reduce gradients in every micro batch",
    "--bucket-cap-mb": "DDP: bucket size in MiB",
    "--gradient-as-bucket-view/--no-gradient-as-bucket-view": "DDP: gradients are views of the buckets",
    "--find-unused-parameters/--no-find-unused-parameters": "DDP: look for parameters without gradients",
    "--static-graph/--no-static-graph": "DDP: every step uses the same parameters",
    "--overlap-comm/--no-overlap-comm": "DeepSpeed: reduce while backward runs, with a second bucket",
    "--contiguous-gradients/--no-contiguous-gradients": "DeepSpeed: copy gradients into a bucket as they are computed",
    "--reduce-scatter/--no-reduce-scatter": "DeepSpeed: reduce each part of a bucket only to its owner",
    "--round-robin-gradients/--no-round-robin-gradients": "ZeRO-1 and ZeRO-2: distribute parameters to the ranks in turn",
    "--reduce-bucket-size": "DeepSpeed: elements reduced at once, or auto (hidden size squared)",
    "--allgather-bucket-size": "DeepSpeed: elements gathered at once",
    "--sub-group-size": "ZeRO-3: elements that the optimizer updates at once",
    "--stage3-prefetch-bucket-size": "ZeRO-3: elements prefetched, or auto",
    "--stage3-param-persistence-threshold": "ZeRO-3: parameters with at most this many elements are not partitioned, or auto",
    "--stage3-max-live-parameters": "ZeRO-3: gathered elements above which some are freed; default: 1000000000",
    "--stage3-max-reuse-distance": "ZeRO-3: parameters needed again within this many elements stay gathered",
    "--zero3-init/--no-zero3-init": "ZeRO-3: from_pretrained shards the model while it loads",
    "--tp-size": "ranks per tensor-parallel group",
    "--cp-size": "ranks that share one sequence (context parallelism)",
    "--sp-size": "DeepSpeed: ranks that share one sequence by Ulysses (accelerate's sp_size)",
    "--seq-parallel-communication-data-type": "DeepSpeed: dtype in which ranks that share a sequence reduce; default: fp32",
    "--ep-size": "ranks that share the experts",
    "--routing": "tokens of divided experts: as many to each, or all to those of one rank; default: balanced",
    "--pp-size": "GPUs that share the stages of a pipeline",
    "--pp-schedule": "order of the pipeline's forwards and backwards; default: 1f1b",
    "--pp-microbatches": "micro batches per run of the schedule, each of --batch-size; default: --pp-size",
    "--pp-layers-per-stage": "layers per stage; default: those of one stage per rank, of two with interleaved1f1b",
    "--pp-round-stages": "round the number of stages up or down to a multiple of --pp-size",
    "--pp-stage-is-unit/--no-pp-stage-is-unit": "whether a stage is a unit of FSDP2 itself (NeMo Automodel's wrap_outer_model)",
    "--whole-tower/--no-whole-tower": "each rank holds all of a frozen tower (NeMo Automodel's frozen_sharding: replicate)",
}
SHORT_HELP = (
    *("--gpus", "--strategy"),
    *("--method", "--r", "--target-modules", "--quant", "--trainer", "--batch-size", "--seq-len"),
    *("--gradient-checkpointing/--no-gradient-checkpointing", "--adapters", "--context"),
)
"""The options of a group that `--help` shows; `--help-all` shows the others too."""
BRIEF = {"--trainer": f"{by_tool(get_args(TrainerName), brief=True)}; default: transformers"}
"""What `--help` says of an option in place of a longer text."""


def _choices(of: object) -> str:
    """The values of a Literal, as `--help` shows them."""
    return f"[{'|'.join(get_args(of))}]"


METAVARS: dict[str, str] = {
    **dict.fromkeys(("--method", "--optim", "--attn-implementation", "--task-type"), "NAME"),
    **dict.fromkeys(("--r", "--lora-alpha", "--num-virtual-tokens", "--num-labels", "--batch-size", "--seq-len"), "INT"),
    **dict.fromkeys(
        ("--gradient-accumulation-steps", "--every-n-layers", "--logits-to-keep", "--quant-bits", "--mtp-depths"), "INT"
    ),
    **dict.fromkeys(
        ("--quant-group-size", "--quant-blocksize", "--adapters", "--context", "--encoder-context", "--save-total-limit"), "INT"
    ),
    **dict.fromkeys(("--target-modules", "--exclude-modules", "--target-parameters", "--modules-to-save"), "NAMES"),
    **dict.fromkeys(("--quant-skip-modules", "--optim-target-modules", "--kernels"), "NAMES"),
    "--dtype": "[bf16|fp16|fp32|auto]",
    **dict.fromkeys(("--adapter-dtype", "--compute-dtype", "--serving-dtype"), "[bf16|fp16|fp32]"),
    "--peft-config": "FILE",
    "--host-memory": "SIZE",
    "--lora-dropout": "FLOAT",
    "--layers-to-transform": "INTS",
    "--rank-pattern": "JSON",
    "--bias": "[none|all|lora_only]",
    "--set": "FIELD=VALUE",
    "--quant-storage": "[uint8|bf16|fp16|fp32]",
    **dict.fromkeys(("--gpus", "--nodes", "--dp-shard-size", "--min-num-params", "--allgather-bucket-size"), "INT"),
    **dict.fromkeys(("--sub-group-size", "--stage3-max-live-parameters", "--stage3-max-reuse-distance"), "INT"),
    **dict.fromkeys(
        ("--tp-size", "--cp-size", "--sp-size", "--ep-size", "--pp-size", "--pp-microbatches", "--pp-layers-per-stage"), "INT"
    ),
    **dict.fromkeys(("--reduce-bucket-size", "--stage3-prefetch-bucket-size"), "INT|auto"),
    "--stage3-param-persistence-threshold": "INT|auto",
    "--routing": "[balanced|worst]",
    **dict.fromkeys(("--param-dtype", "--reduce-dtype", "--seq-parallel-communication-data-type"), "[bf16|fp16|fp32]"),
    **dict.fromkeys(("--offload-params", "--offload-optimizer"), _choices(Place)),
    **dict.fromkeys(("--accelerate-config", "--deepspeed"), "FILE"),
    **dict.fromkeys(("--accelerate", "--deepspeed-version", "--tool-version"), "VERSION"),
    "--strategy": _choices(StrategyName),
    "--reshard-after-forward": "[true|false|INT]",
    "--pp-schedule": _choices(Schedule),
    "--pp-round-stages": "[up|down]",
    "--wrap-policy": _choices(WrapPolicy),
    "--backward-prefetch": _choices(Prefetch),
    "--transformer-cls-names-to-wrap": "NAMES",
    "--bucket-cap-mb": "FLOAT",
    "--autocast": _choices(Autocast),
    "--device-map": _choices(DeviceMap),
    "--quant": "[none|nf4|fp4|int8|fp8|mxfp4|gptq|awq|hqq]",
    "--trainer": _choices(TrainerName),
    "--attn-implementation": "[sdpa|eager|flash_attention_2]",
    "--loss": _choices(Loss),
    "--optim-args": "KEY=VALUE,…",
    "--max-completion-length": "INT",
    "--beta": "FLOAT",
    **dict.fromkeys(("--max-prompt-length", "--num-generations", "--steps-per-generation", "--n-passages"), "INT"),
    **dict.fromkeys(("--rollout-batch-size", "--eval-batch-size"), "INT"),
    "--vllm-mode": "[colocate|server]",
    "--vllm-gpu-memory-utilization": "FLOAT",
    "--move-model-batches": "INTEGER",
    "--loss-type": "NAME",
    "--teacher-model": "MODEL",
    "--reward-model": "MODEL",
}
"""The value of each option, as `--help` shows it; completion offers the choices."""
