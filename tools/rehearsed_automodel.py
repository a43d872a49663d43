"""Rehearse NeMo Automodel's fine-tuning recipe and keep what it held beside the options of `peftplan estimate` of the same job.

    python -m tools.rehearsed_automodel FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `model` and how many of its `layers` run, the dtype of its `checkpoint` if not bfloat16, the
`options` of the estimate, what else sections of the config say (`recipe`: LoRA adapts `*_proj` unless its `peft` names others),
the `card` if not an A100, the `rank` that is played if not 0, and `routing` if it is not balanced. Rows are as long as `seq_len`
says, and each token is scored.
Where rows are packed, the emulated card, whose tensors hold no values, tells no documents apart: attention has no mask there.
Experts get equal shares of the tokens, and kernels are not chosen by their time. Needs nemo_automodel 0.7.0, the CUDA build of
torch, where a recipe says `backend.attn: te`, what `tools.uncompiled_te` needs, for flash-attn a package of its name, and for
Nemotron-H mamba-ssm and causal-conv1d, of which `NEMOTRON_H` names a folder with the code that is published beside its weights.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import yaml

from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools import hybrid_ep, uncompiled_te
from tools.checkpoints import further_pattern, in_4_bits, in_8_bits, rename, rewrite, with_further_tokens
from tools.rank_grid import cut
from tools.rehearsed_recipes import complete, kept_of

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


KINDS_OF_TOKENS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
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
    return {"model": cut(row["model"], row["layers"]), **job}


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
    if row.get("recipe", {}).get("recipe") == OF_PICTURES:
        sections["model"]["_target_"] = "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained"
        sections["dataloader"]["collate_fn"] = {"_target_": f"{__name__}.pictureless"}
        sections["processor"] = {"_target_": f"{__name__}.named", "name": job["model"]["model_type"]}
    return sections | {name: _merged(sections.get(name), settings) for name, settings in row.get("recipe", {}).items()}


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
        standins.write_repository(Path(folder), {**cut(row["model"], row["layers"]), "dtype": row.get("checkpoint", "bfloat16")})
        if (names := PUBLISHED.get(options(row)["model"]["model_type"])) is not None:
            rename(Path(folder) / "model.safetensors", names)
        if pattern := further_pattern(options(row)["model"]):
            rewrite(Path(folder) / "model.safetensors", partial(with_further_tokens, row["layers"], pattern))
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


class Agreeing:
    """`torch.distributed` whose ranks that are not there say what this one says: that all gradients are present."""

    def __init__(self, distributed: Any) -> None:
        self.distributed = distributed

    def __getattr__(self, name: str) -> Any:
        """All else is torch's."""
        return getattr(self.distributed, name)

    def all_reduce(self, tensor: Any, *, op: Any, group: Any) -> None:
        """Integers count ranks; the emulated card adds nothing."""
        if tensor.is_floating_point():
            self.distributed.all_reduce(tensor, op=op, group=group)
        else:
            tensor.copy_(tensor.cpu().fill_(group.size()))


class Told:
    """`torch.distributed` whose other ranks send tensors of this shape in bf16."""

    def __init__(self, distributed: Any, shape: tuple[int, ...]) -> None:
        self.distributed, self.shape = distributed, shape

    def __getattr__(self, name: str) -> Any:
        """All else is torch's."""
        return getattr(self.distributed, name)

    def broadcast_object_list(self, objects: list[Any], *, src: int, group: Any, device: Any) -> None:
        """What describes a tensor (nemo_automodel, recipes/kd_utils.py, `_tree_spec`)."""
        if src != self.distributed.get_rank():
            objects[0] = ("tensor", 0, self.shape, "bfloat16")


def distil(settings: dict[str, Any]) -> None:
    """Make a rank of the student's mesh go on without the teacher's, without tokenizers, and with tokens that are all scored: the
    emulated card does not say how many are."""
    from nemo_automodel.components.loss import kd_loss
    from nemo_automodel.recipes import kd_utils
    from nemo_automodel.recipes.llm import kd
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(settings["model"]["pretrained_model_name_or_path"]).vocab_size
    shape = (settings["step_scheduler"]["local_batch_size"], settings["dataset"]["length"], vocabulary)
    kd_utils.dist = Told(kd_utils.dist, shape)
    kd._verify_tokenizer_compatibility = lambda *_: None
    source = inspect.getsource(kd_loss.KDLoss).replace("valid_mask.sum() == 0", "valid_mask.numel() == 0")
    exec(source, kd_loss.__dict__)


def untimed(compile: Callable[..., Any], function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """`torch.compile` that takes the first kernel: the emulated card has no times to compare."""
    settings.pop("mode", None)
    options = {name: value for name, value in (settings.pop("options", None) or {}).items() if name != "max_autotune"}
    return compile(function, **settings, options=options or None)


def first_config(autotune: Callable[..., Any], configs: list[Any], key: list[str], **settings: Any) -> Any:
    """`triton.autotune` that takes the way to run a kernel that needs the smallest tiles, and so times none."""
    return autotune([min(configs, key=lambda config: prod([config.num_stages, *_sizes(config)]))], key, **settings)


def _sizes(config: Any) -> list[int]:
    return [size for size in config.kwargs.values() if isinstance(size, int) and size > 0]


def forget_scalars(experts: ModuleType) -> None:
    """Let the card forget a number of the loss: the backward of `weights[mask]` may ask for a count where it was written."""
    import torch

    permute, others = experts._permute_tokens_for_grouped_mm, (torch.zeros(3, device="cuda"), torch.zeros(3))

    def write(gradient: torch.Tensor) -> None:
        others[0].copy_(others[1])

    def watched(*arguments: Any, **settings: Any) -> Any:
        result = permute(*arguments, **settings)
        if result[-3].requires_grad:  # the weights of the rows
            result[-3].register_hook(write)
        return result

    experts._permute_tokens_for_grouped_mm = watched


def divide(experts: ModuleType, ranks: int) -> None:
    """Experts that `ranks` divide without an exchange: all have as many tokens, of whose rows each gets an equal share."""
    import torch

    from peftplan.rehearse.inside import known

    permute, places, gather = experts._permute_tokens_for_grouped_mm, known._places, experts.dist.all_gather
    bincount = torch.bincount

    def shared(*arguments: Any, **settings: Any) -> Any:
        known._places = lambda mask: places(mask) // ranks
        torch.bincount = lambda numbers, minlength: numbers.new_zeros(minlength)
        result = permute(*arguments, **settings)
        known._places, torch.bincount = places, bincount
        return result

    def all_gather(results: list[Any], tensor: Any, *, group: Any) -> None:
        gather(results, tensor, group=group)
        for result in results if tensor.numel() == 1 else ():
            result.copy_(tensor.cpu())

    experts._permute_tokens_for_grouped_mm = shared
    experts.dist = Gathering(experts.dist, all_gather)


class Gathering:
    """`torch.distributed` with another `all_gather`."""

    def __init__(self, distributed: Any, all_gather: Callable[..., None]) -> None:
        self.distributed, self.all_gather = distributed, all_gather

    def __getattr__(self, name: str) -> Any:
        """All else is torch's."""
        return getattr(self.distributed, name)


def register_unused(package: str) -> None:
    """A package that the recipe imports, and whose functions the rehearsed model does not call."""
    for name in (package, f"{package}.api"):
        module = ModuleType(name)
        module.__dict__.update({"__path__": [], "calc_attn": None, "get_most_recent_key": None})
        sys.modules[name] = module


def pack_by_positions(settings: dict[str, Any]) -> None:
    """Let transformers' modules run flash-attn's kernels, which the card has not, over documents whose ends it does not say."""
    import torch
    from nemo_automodel._transformers import kernel_patches
    from transformers import PreTrainedModel
    from transformers import modeling_flash_attention_utils as utils

    from peftplan.trace.cuda import flash

    length, row = settings["dataset"]["length"], settings["packed_sequence"]["packed_sequence_size"]

    def ends(_positions: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
        documents = torch.tensor(range(0, row + 1, length), dtype=torch.int32).cuda()
        return (documents, documents), (length, length)

    kernels = (flash.flash_attn_func, flash.flash_attn_varlen_func, None, flash.pad_input, flash.unpad_input)
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
    utils._lazy_imports = lambda *_, **__: kernels
    utils._is_packed_sequence = lambda _positions, batch_size: batch_size == 1
    utils.prepare_fa_kwargs_from_position_ids = ends
    kernel_patches.HAS_FA = True


def recipe() -> None:
    """The tool's own program, on one rank of several."""
    import torch

    compiled = torch.compile
    torch.compile = partial(untimed, compiled)
    with suppress(ImportError):
        import triton

        triton.autotune = partial(first_config, triton.autotune)
    settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8"))
    backend = settings["model"].get("backend", {})
    if "te" in (backend.get("attn"), backend.get("linear")) or backend.get("dispatcher") in ("deepep", "uccl_ep"):
        uncompiled_te.install_for_automodel()
    if backend.get("dispatcher") in ("hybridep", "deepep", "uccl_ep"):
        from transformers import AutoConfig

        model = settings["model"].get("config", settings["model"])
        text = AutoConfig.from_pretrained(model["pretrained_model_name_or_path"]).get_text_config()
        hybrid_ep.install(getattr(text, "top_k_experts", None) or text.num_experts_per_tok)
    if settings["model"].get("attn_implementation") == "flash_attention_2":
        pack_by_positions(settings)
    if backend.get("attn") == "magi":
        register_unused("magi_attention")
    from nemo_automodel.components.distributed import tp_replicas
    from nemo_automodel.components.moe import experts

    if (ranks := settings.get("distributed", {}).get("ep_size") or 1) > 1 and "dispatcher" not in backend:
        divide(experts, ranks)
    forget_scalars(experts)
    tp_replicas.dist = Agreeing(tp_replicas.dist)
    if "teacher_model" in settings:
        distil(settings)
        settings["recipe"] = "distillation"
    module = "llm.train_ft"
    if settings["recipe"].startswith("Benchmarking"):
        from nemo_automodel.components.utils import flops_utils

        module = "llm.benchmark"
        flops_utils.calculate_mfu = lambda *_, **__: 0.0  # of times that the emulated card does not hold
    module = {OF_PICTURES: "vlm.finetune", "distillation": "llm.kd"}.get(settings["recipe"], module)
    runpy.run_module(f"nemo_automodel.recipes.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tools import rehearsed_automodel  # under the name that a config can import

    if sys.argv[1] == "--config":
        rehearsed_automodel.recipe()
    else:
        complete(Path(sys.argv[1]), rehearsed_automodel.run)
