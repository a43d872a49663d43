"""Rehearse NeMo Automodel's fine-tuning recipe and keep what it held beside the options of `peftplan estimate` of the same job.

    python -m tools.rehearsed_automodel FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `model` and how many of its `layers` run, the dtype of its `checkpoint` if not bfloat16, the
`options` of the estimate, what else sections of the config say (`recipe`: LoRA adapts `*_proj` unless its `peft` names others;
in `values` a null stays one),
the `card` if not an A100, the `rank` that is played if not 0, and `routing` if it is not balanced. Rows are as long as `seq_len`
says, and each token is scored.
Where rows are packed, the emulated card, whose tensors hold no values, tells no documents apart: attention has no mask there.
Experts get equal shares of the tokens, and kernels are not chosen by their time. Needs nemo_automodel 0.7.0, the CUDA build of
torch, where a recipe says `backend.attn: te`, what `tools.uncompiled_te` needs, for flash-attn a package of its name, and for
Nemotron-H mamba-ssm and causal-conv1d, of which `NEMOTRON_H` names a folder with the code that is published beside its weights.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import yaml

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools import automodel_retrieval, checkpoints, hybrid_ep, uncompiled_te
from tools import automodel_unsaid as unsaid
from tools.checkpoints import further_pattern, in_4_bits, in_8_bits, rename, rewrite, with_further_tokens
from tools.rank_grid import cut
from tools.rehearsed_recipes import complete, kept_of

SUBCLASSED = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not know → those of which the tool's config is a subclass without fields of its own
(components/models/kimi_k2/config.py)."""
SHARED: dict[str, Any] = {"trainer": "automodel", "strategy": "fsdp2", "gpus": 8}
"""Options of every job."""
PROJECTIONS = "*_proj"
STEPS = 5
OF_PICTURES = "FinetuneRecipeForVLM"
MOCK = "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset"
"""Batches that a data set makes itself, with places and without a mask."""
FOLDER = "(folder)"
"""What stands for the checkpoint in what a row says of the recipe."""
CARD = "8xa100-80gb"
"""On newer cards the recipe prefers the attention of cuDNN, which the emulated card does not run."""


class Rows:
    """Rows of one length, with the fields that the tool's own data sets have."""

    def __init__(self, length: int, count: int, *, translated: bool = False, masked: bool = True) -> None:
        self.length, self.count, self.translated, self.masked = length, count, translated, masked

    def __len__(self) -> int:
        """How many there are."""
        return self.count

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """Tokens, and labels as the recipe's loss takes them; IndexError ends an iteration."""
        if number >= self.count:
            raise IndexError(number)
        tokens = [(7 * number + place) % 90 + 5 for place in range(self.length)]
        fields = {"input_ids": tokens, "labels": [*tokens]} | ({"attention_mask": [1] * self.length} if self.masked else {})
        return fields | ({"decoder_input_ids": [*tokens]} if self.translated else {})


def rows(length: int, count: int, *, translated: bool = False, masked: bool = True) -> Rows:
    """A component of a config. `translated`: with what a decoder reads, as an encoder-decoder needs it. `masked`: with a mask, of
    which a stage of a pipeline asks the card whether it hides tokens; the emulated card says that it does."""
    return Rows(length, count, translated=translated, masked=masked)


KINDS_OF_TOKENS = {
    "gemma3": "token_type_ids",
    "gemma4": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "qwen3_vl_moe": "mm_token_type_ids",
}
"""Model type → what its processor says of each token: whether it is one of a picture."""


def pictureless(examples: list[dict[str, list[int]]], processor: Any) -> dict[str, Any]:
    """A batch of the recipe of vision-language models whose conversations have no pictures."""
    import torch

    batch = {name: torch.tensor([row[name] for row in examples]) for name in examples[0]}
    return batch | ({kinds: torch.zeros_like(batch["input_ids"])} if (kinds := KINDS_OF_TOKENS.get(processor)) else {})


def named(name: str) -> str:
    """What stands for a processor: its model type."""
    return name


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it."""
    job = SHARED | row["options"]
    if job["gpus"] == 1:
        del job["strategy"]
    model = cut(row["model"], row["layers"])
    return {"model": model | {"model_type": SUBCLASSED.get(model["model_type"], model["model_type"])}, **job}


def documents(row: dict[str, Any]) -> int:
    """How many rows of the data set a packed row holds."""
    recipe = row.get("recipe", {})
    size = recipe.get("packed_sequence", {}).get("packed_sequence_size") or 0
    return max(1, size // recipe.get("dataset", {}).get("length", row["options"]["seq_len"]))


def config(row: dict[str, Any], folder: str, output: str) -> dict[str, Any]:
    """The job as the recipe takes it."""
    job = options(row)
    batch = job.get("batch_size", 1) * job.get("pp_microbatches", 1)
    readers = job["gpus"] // (job.get("tp_size", 1) * job.get("cp_size", 1) * job.get("pp_size", 1))
    step = batch * readers * job.get("gradient_accumulation_steps", 1)
    translates = "num_decoder_layers" in job["model"]
    tool, attention = "nemo_automodel.components", job.get("attn_implementation")
    optimizer = {"_target_": "torch.optim.Adam", "lr": 1e-5, "weight_decay": 0}
    peft = {"_target_": f"{tool}._peft.lora.PeftConfig", "target_modules": PROJECTIONS, "dim": job.get("r"), "alpha": 32}
    sections = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "step_scheduler": {"global_batch_size": step, "local_batch_size": batch, "max_steps": STEPS},
        "dist_env": {"backend": "nccl", "timeout_minutes": 1},
        "model": {
            "_target_": f"nemo_automodel.NeMoAutoModelFor{'Seq2Seq' if translates else 'Causal'}LM.from_pretrained",
            "pretrained_model_name_or_path": folder,
            "torch_dtype": "bfloat16",
            **({"attn_implementation": attention} if attention else {}),
        },
        "distributed": {
            "strategy": SHARED["strategy"],
            "activation_checkpointing": job.get("gradient_checkpointing", False),
            **{name: job[name] for name in ("tp_size", "cp_size", "pp_size", "ep_size") if name in job},
            **({"pipeline": _pipeline(job)} if "pp_size" in job else {}),
        },
        "loss_fn": {"_target_": f"{tool}.loss.masked_ce.MaskedCrossEntropy"},
        "checkpoint": {"enabled": False, "checkpoint_dir": output},
        "dataset": {
            "_target_": f"{__name__}.rows",
            "length": job["seq_len"],
            "count": step * (STEPS + 1) * documents(row),
            "tokenizer": None,
            **({"translated": True} if translates else {}),
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": f"{tool}.datasets.utils.default_collater",
            "shuffle": False,
        },
        "optimizer": optimizer,
        **({"peft": peft} if job["method"] == "lora" else {}),
    }
    if row.get("recipe", {}).get("dataset", {}).get("_target_") == MOCK:
        sections["dataset"] = {"seq_len": job["seq_len"], "num_samples": step * (STEPS + 1), "batch_size": batch}
        sections["dataloader"] = {"_target_": "torch.utils.data.DataLoader", "batch_size": None, "num_workers": 0}
        sections["benchmark"] = {"warmup_steps": 1, "peak_tflops": 989, "nsys_start": -1, "nsys_end": -1, "nsys_ranks": []}
    if job.get("trainer") in automodel_retrieval.MODELS:
        sections |= automodel_retrieval.sections(job, folder, step * (STEPS + 1))
    if row.get("recipe", {}).get("recipe") == OF_PICTURES:
        sections["model"]["_target_"] = "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained"
        sections["dataloader"]["collate_fn"] = {"_target_": f"{__name__}.pictureless"}
        sections["processor"] = {"_target_": f"{__name__}.named", "name": job["model"]["model_type"]}
    sections |= {name: _merged(sections.get(name), settings) for name, settings in row.get("recipe", {}).items()}
    return sections | {
        name: (sections.get(name) or {}) | settings if isinstance(settings, dict) else settings
        for name, settings in row.get("values", {}).items()
    }


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's config."""
    return read_values(config(row, row["model"], "saved"), file="a.yaml", tool="nemo-automodel")


def _pipeline(job: dict[str, Any]) -> dict[str, Any]:
    """How stages run micro batches."""
    layers = {"layers_per_stage": job["pp_layers_per_stage"]} if "pp_layers_per_stage" in job else {}
    size = job.get("batch_size", 1)
    return {"pp_schedule": job.get("pp_schedule", "1f1b"), "pp_microbatch_size": size, "scale_grads_in_schedule": False} | layers


def _merged(section: Any, settings: Any) -> Any:
    """A section with what a row says of it; `null` takes a key out, and a name in place of a section stands by itself."""
    if not isinstance(settings, dict):
        return settings
    return {name: value for name, value in ((section or {}) | settings).items() if value is not None}


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the recipe held."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), {**options(row)["model"], "dtype": row.get("checkpoint", "bfloat16")})
        if (names := PUBLISHED.get(options(row)["model"]["model_type"])) is not None:
            rename(Path(folder) / "model.safetensors", names)
        if pattern := further_pattern(options(row)["model"]):
            rewrite(Path(folder) / "model.safetensors", partial(with_further_tokens, row["layers"], pattern))
        for change in CHANGED.get(options(row)["model"]["model_type"], ()):
            rewrite(Path(folder) / "model.safetensors", change)
        if row.get("recipe", {}).get("model", {}).get("trust_remote_code"):
            add_code(Path(folder), Path(os.environ["NEMOTRON_H"]))
        if (quantized := options(row)["model"].get("quantization_config")) is not None:
            rewrite(Path(folder) / "model.safetensors", in_8_bits if quantized["quant_method"] == "fp8" else in_4_bits)
        file = Path(output) / "recipe.yaml"
        file.write_text(yaml.safe_dump(config(row, folder, output)).replace(FOLDER, folder), encoding="utf-8")
        command = [sys.executable, "-m", __name__, "--config", str(file)]
        os.environ["ROUTING"] = row.get("routing", "balanced")
        ranks, card, rank = row.get("ranks", options(row)["gpus"]), row.get("card", CARD), row.get("rank", 0)
        return row | kept_of(rehearse(command, world_size=ranks, rank=rank, gpu=card, timeout=3000, stdout=sys.stderr.fileno()))


LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
QWEN_VL = {"model.language_model.": "model.", "model.visual.": "visual."}
PUBLISHED = {"mistral3": LLAVA, "gemma3": LLAVA, "qwen2_5_vl": QWEN_VL, "nemotron_h": {"model.": "backbone."}}
"""Model type → how names of transformers' model begin → how they do in the published checkpoint, which is what the tool reads."""

CHANGED = {
    "qwen3_5": (checkpoints.with_attending_layer,),
    "qwen3_5_moe": (checkpoints.with_attending_layer, checkpoints.with_stacked_experts),
    "qwen3_vl_moe": (checkpoints.with_columns_first,),
}
"""Model type → how its published checkpoint differs from what transformers' model would save."""


LENGTH = ("cache_position[-1] + 1", "cache_position.shape[0]")
"""A number that published code reads from the card, which has none, and another way to say it."""


def add_code(folder: Path, code: Path) -> None:
    """Put the published modules of Nemotron-H beside a config, which then names their classes as the published one does."""
    for name in ("modeling_nemotron_h.py", "configuration_nemotron_h.py"):
        text = (code / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(*LENGTH), encoding="utf-8")
    file = folder / "config.json"
    classes = {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    }
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"auto_map": classes}), encoding="utf-8")


def fused_adam(*arguments: Any, **settings: Any) -> Any:
    """Transformer Engine's own optimizer without its compiled part, whose kernels work in place: of the folder of its wheel."""
    package = Path(os.environ["TRANSFORMER_ENGINE"])
    for folder in ("", ".pytorch", ".pytorch.optimizers", ".pytorch.tensor"):
        module = ModuleType(f"transformer_engine{folder}")
        module.__path__ = [str(package.joinpath(*folder.split(".")))]
        sys.modules[module.__name__] = module
    for name in ("_torch", ".pytorch.constants", ".pytorch.quantized_tensor", ".pytorch.tensor.float8_tensor"):
        compiled = ModuleType(f"transformer_engine{name}")
        compiled.__dict__["__getattr__"] = lambda name: type(name, (), {"__new__": lambda cls, *_: None, "kFloat32": 0})
        sys.modules[compiled.__name__] = compiled
    return importlib.import_module("transformer_engine.pytorch.optimizers.fused_adam").FusedAdam(*arguments, **settings)


def recipe() -> None:
    """The tool's own program, on one rank of several."""
    import torch

    compiled = torch.compile
    torch.compile = partial(unsaid.untimed, compiled)
    with suppress(ImportError):
        import triton

        triton.autotune = partial(unsaid.first_config, triton.autotune)
    settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8"))
    backend = settings["model"].get("backend", {})
    by_engine = "te" in (backend.get("attn"), backend.get("linear"), backend.get("experts"))
    if by_engine or backend.get("dispatcher") in ("deepep", "uccl_ep"):
        uncompiled_te.install_for_automodel()
    if backend.get("dispatcher") in ("hybridep", "deepep", "uccl_ep"):
        from transformers import AutoConfig

        model = settings["model"].get("config", settings["model"])
        text = AutoConfig.from_pretrained(model["pretrained_model_name_or_path"]).get_text_config()
        top_k = getattr(text, "top_k_experts", None) or text.num_experts_per_tok
        hybrid_ep.install(top_k, dealt=bool(backend.get("fake_balanced_gate")))
    if settings["model"].get("attn_implementation") == "flash_attention_2":
        unsaid.pack_by_positions(settings)
    if "quack" in backend.values():
        unsaid.launch_nothing_of_quack()
    if backend.get("attn") == "magi":
        unsaid.register_unused("magi_attention")
    unsaid.hide_nothing()
    if settings["dataset"].get("_target_") == MOCK:
        unsaid.number_one_document()
    from nemo_automodel.components.distributed import tp_replicas
    from nemo_automodel.components.moe import experts

    if (ranks := settings.get("distributed", {}).get("ep_size") or 1) > 1 and "dispatcher" not in backend:
        unsaid.divide(experts, ranks)
    unsaid.forget_scalars(experts)
    tp_replicas.dist = unsaid.Agreeing(tp_replicas.dist)
    if "teacher_model" in settings:
        unsaid.distil(settings)
        settings["recipe"] = "distillation"
    module = "llm.train_ft"
    if settings["recipe"].startswith("Benchmarking"):
        from nemo_automodel.components.utils import flops_utils

        module = "llm.benchmark"
        flops_utils.calculate_mfu = lambda *_, **__: 0.0  # of times that the emulated card does not hold
    others = {OF_PICTURES: "vlm.finetune", "distillation": "llm.kd", **automodel_retrieval.MODULES}
    module = others.get(settings["recipe"], module)
    runpy.run_module(f"nemo_automodel.recipes.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tools import rehearsed_automodel  # under the name that a config can import

    if sys.argv[1] == "--config":
        rehearsed_automodel.recipe()
    else:
        complete(Path(sys.argv[1]), rehearsed_automodel.run)
