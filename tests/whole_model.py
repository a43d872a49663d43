"""The witness of the static ledger: a real tiny model, loaded by transformers, adapted by peft, trained for one step on the CPU.

Every tensor that is then alive is listed with the ledger's category, its dtype and the bytes of its storage.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import bitsandbytes
import datasets
import peft
import tokenizers
import torch
import transformers
import trl

import peftplan
from peftplan.arch.modules import Architecture
from peftplan.arch.readers import read_config
from peftplan.dtypes import ITEMSIZE, parse_dtype
from peftplan.ledger import Ledger
from peftplan.methods import METHODS

Config = dict[str, Any]
Tensors = Counter[tuple[str, str, int]]
"""(category, dtype, bytes) → how many tensors."""

_DECODER: Config = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_GQA = _DECODER | {"num_key_value_heads": 2}
_BART: Config = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 128, "vocab_size": 500, "max_position_embeddings": 64, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Config] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **_GQA},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, **_GQA},
    "llama-wide": {"model_type": "llama", "tie_word_embeddings": False, **_GQA, "hidden_size": 256, "num_hidden_layers": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 500,
             "bos_token_id": 0, "eos_token_id": 0},
    "t5": {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
           "vocab_size": 500, "decoder_start_token_id": 0},
    "bert": {"model_type": "bert", "type_vocab_size": 2, **_DECODER},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **_GQA, "num_hidden_layers": 2},
    "gemma": {"model_type": "gemma", "head_dim": 16, **_GQA},
    "opt": {"model_type": "opt", **_DECODER, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "deepseek_v3": {"model_type": "deepseek_v3", **_DECODER, "num_key_value_heads": 4, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "q_lora_rank": 24, "kv_lora_rank": 32,
                    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
                    "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "bart": {"model_type": "bart", **_BART},
    "whisper": {"model_type": "whisper", **_BART, "max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 16,
                "begin_suppress_tokens": None},
}  # fmt: skip

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One run: the words that peftplan takes, from which the real run is made."""

    model: str
    method: str
    quant: str = "none"
    optim: str = "adamw_torch_fused"
    trainer: str = "transformers"
    dtype: str = "bf16"
    double_quant: bool = False
    kbit_prepare: bool | None = None
    adapter_dtype: str | None = None
    task_type: str | None = None
    quant_skip_modules: tuple[str, ...] | None = None
    options: Config = field(default_factory=dict)

    def __str__(self) -> str:
        quant = f"{self.quant}+dq" if self.double_quant else self.quant
        words = (self.model, self.method, quant, self.dtype, self.trainer, self.optim, *map(str, self.options.values()))
        return "-".join(word for word in words if word).replace(" ", "")

    @property
    def config(self) -> Config:
        """The model's config.json."""
        return CONFIGS[self.model]


def architecture(case: Case) -> Architecture:
    """Ours: it names the model class and the task."""
    return read_config(case.config, name=case.model, task_type=case.task_type)


def planned(case: Case) -> Ledger:
    """What lasts from step to step, as `peftplan.estimate` states it; AdaLoRA's rank allocator does not run here."""
    words = ("method", "quant", "optim", "trainer", "dtype", "kbit_prepare", "adapter_dtype", "task_type", "quant_skip_modules")
    options = {word: getattr(case, word) for word in words}
    static = peftplan.estimate(case.config, **options, double_quant=case.double_quant or None, **case.options).static
    return Ledger(tuple(line for line in static if "RankAllocator" not in line.source))


def on_device(ledger: Ledger) -> Tensors:
    """What the ledger states for the device, tensor by tensor."""
    tensors: Tensors = Counter()
    for line in ledger:
        if line.place == "device":
            tensors[line.category, line.dtype, ITEMSIZE[line.dtype] * prod(int(dim) for dim in line.dims)] += line.copies
    return tensors


def alive(case: Case, folder: Path) -> Tensors:
    """What a real run holds after one step."""
    # singletons that outlive a model: overrides by id(parameter), and the map of double quantization
    bitsandbytes.optim.GlobalOptimManager._instance = None
    bitsandbytes.functional.name2qmap.clear()
    gc.collect()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(case, folder)
        model, optimizer = prepare(case, model, folder)
        step(case, model, optimizer)
    return Counter(
        (category, parse_dtype(tensor.dtype), tensor.untyped_storage().nbytes())
        for category, tensor in once(tensors(model, optimizer))
    )


def load(case: Case, folder: Path) -> Any:
    """The model from its checkpoint, with every rule of `from_pretrained`."""
    cls = getattr(transformers, architecture(case).model_class)
    path = folder / f"{case.model}-{cls.__name__}"
    if not path.exists():
        fields = {key: value for key, value in case.config.items() if key != "model_type"}
        cls(transformers.AutoConfig.for_model(case.config["model_type"], **fields)).save_pretrained(path)
    quant = None
    skip = list(case.quant_skip_modules) if case.quant_skip_modules else None
    if case.quant == "int8":
        quant = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    elif case.quant != "none":
        quant = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=case.quant, bnb_4bit_use_double_quant=case.double_quant,
            bnb_4bit_compute_dtype=TORCH[case.dtype], llm_int8_skip_modules=skip,
        )  # fmt: skip
    return cls.from_pretrained(path, dtype=TORCH[case.dtype], quantization_config=quant, device_map="cpu")


def prepare(case: Case, model: Any, folder: Path) -> tuple[Any, torch.optim.Optimizer]:
    """The model with its adapter, and the optimizer, both made as the trainer makes them."""
    config = adapter_config(case, model)
    if case.trainer == "trl":
        trainer = sft_trainer(case, model, config, folder)
        return trainer.model, trainer.create_optimizer()
    if case.quant != "none" and case.kbit_prepare is not False:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if config is not None:
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=case.adapter_dtype in (None, "fp32"))
    elif case.method == "bitfit":
        heads = () if case.task_type is None else ("classifier",)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith(heads))
    if case.trainer == "plain":
        return model, plain_optimizer(case, model)
    arguments = transformers.TrainingArguments(str(folder), optim=case.optim, use_cpu=True, report_to=[])
    return model, transformers.Trainer(model=model, args=arguments).create_optimizer()


def adapter_config(case: Case, model: Any) -> Any:
    """peft's own config, or None for a method that peft does not have."""
    method = METHODS[case.method]
    if method.peft_type is None:
        return None
    cls = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.peft_type)]
    options = dict(method.defaults) | case.options
    if case.method in ("lora", "dora"):
        options.setdefault("target_modules", "all-linear")
    # of speech models, peft wants no task: its seq2seq wrapper passes input_ids
    return cls(task_type=None if case.model == "whisper" else architecture(case).task_type, **options)


def sft_trainer(case: Case, model: Any, config: Any, folder: Path) -> Any:
    """TRL's trainer around a model that is loaded already."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(500)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="1", unk_token="0")
    arguments = trl.SFTConfig(
        str(folder), optim=case.optim, use_cpu=True, bf16=False, report_to=[], max_length=16, dataset_num_proc=None
    )
    return trl.SFTTrainer(
        model=model, args=arguments, peft_config=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 2}),
    )  # fmt: skip


def plain_optimizer(case: Case, model: Any) -> torch.optim.Optimizer:
    """What a hand-written loop makes of the same name."""
    trained = [p for p in model.parameters() if p.requires_grad]
    plain: dict[str, Any] = {
        "adamw_torch": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "lion_8bit": bitsandbytes.optim.Lion8bit,
    }
    return plain[case.optim](trained, lr=1e-4)  # type: ignore[no-any-return]


def step(case: Case, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward and one step; the gradients stay."""
    autocast = torch.autocast("cpu", TORCH[case.dtype]) if case.trainer != "plain" and case.dtype != "fp32" else None
    model.train()
    with autocast or contextlib.nullcontext():
        loss = model(**batch(case)).loss
    loss.backward()
    optimizer.step()


def batch(case: Case) -> dict[str, torch.Tensor]:
    """Two sequences of twelve tokens, with the labels of the task."""
    task = architecture(case).task_type
    ids = torch.randint(5, 500, (2, 12))
    if case.config["model_type"] == "whisper":
        frames = torch.randn(2, case.config["num_mel_bins"], 2 * case.config["max_source_positions"])
        return {"input_features": frames.to(TORCH[case.dtype]), "labels": ids}
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1]) if task == "SEQ_CLS" else ids}


def tensors(model: Any, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model and its optimizer with its category; some come more than once."""
    yield from ((category_of(name, p), p) for name, p in model.named_parameters())
    for module in model.modules():
        yield from (("quant_state", tensor) for tensor in quant_state(module))
    yield from (("quant_state", code) for code in bitsandbytes.functional.name2qmap.values())
    yield from (("buffers", buffer) for buffer in model.buffers())
    yield from (("gradients", p.grad) for p in model.parameters() if p.grad is not None)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, state in optimizer.state[parameter].items():
                # torch keeps the step of what is not fused on the host (`_init_group`)
                if torch.is_tensor(state) and (name != "step" or group.get("fused")):
                    yield "optimizer_states", state


def category_of(name: str, parameter: torch.Tensor) -> str:
    """An adapter's weights are what the base does not have under the same name."""
    parts = name.split(".")
    adapter = parts[0] == "prompt_encoder" or "default" in parts
    return "adapter_weights" if adapter else "weights"


def quant_state(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What a bitsandbytes layer holds besides its packed weight."""
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = module.weight.quant_state
        nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
        yield from (state.absmax, state.code, *nested)
    elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
        yield from (t for t in (module.weight.SCB, module.state.SCB) if t is not None)


def once(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each storage once, under the category that it first has."""
    seen: set[int] = set()
    for category, tensor in tensors:
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            yield category, tensor
