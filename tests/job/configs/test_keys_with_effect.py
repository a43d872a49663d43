"""Keys that were listed without effect on memory, and have one."""

from __future__ import annotations

import pytest

from peftplan.job.configs.facts import facts
from peftplan.job.configs.read import read_text, read_values
from tests.job.configs.files import read

VISION = {
    "recipe": "FinetuneRecipeForVLM",
    "model": {
        "_target_": "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained",
        "pretrained_model_name_or_path": "mistralai/Ministral-3-3B-Instruct-2512",
    },
    "step_scheduler": {"local_batch_size": 1},
}
"""A recipe of NeMo Automodel for rows with pictures."""
COLLATE = "nemo_automodel.components.datasets.vlm.collate_fns.default_collate_fn"
UNSLOTH = """
from unsloth import FastLanguageModel, FastModel, FastVisionModel
from trl import SFTConfig, SFTTrainer
model, tokenizer = {load}.from_pretrained(model_name="unsloth/Qwen2.5-0.5B", max_seq_length=1024{loaded})
model = {adapt}.get_peft_model(model, r=8, use_gradient_checkpointing=False)
trainer = SFTTrainer(model=model, tokenizer=tokenizer, args=SFTConfig(per_device_train_batch_size=2))
trainer.train()
"""


@pytest.mark.parametrize(
    ("further", "seq_len", "unsupported"),
    [
        ({}, None, set()),
        ({"dataloader": {"collate_fn": {"_target_": COLLATE, "max_length": 1024}}}, 1024, set()),
        ({"packed_sequence": {"pretokenize": True, "max_length": 512, "pack_size": 4096}}, 4096, {"packed_sequence.pack_size"}),
        (
            {
                "packed_sequence": {"pretokenize": True, "pack_size": 4096, "collate_max_length": 4608},
                "dataloader": {"collate_fn": {"_target_": COLLATE, "max_length": 1024}},
            },
            4608,
            {"packed_sequence.pack_size"},
        ),
        ({"packed_sequence": {"pretokenize": True, "max_length": 512}}, None, set()),
    ],
)
def test_rows_of_pictures_in_nemo(further: dict[str, object], seq_len: int | None, unsupported: set[str]) -> None:
    """Rows are padded to the collator's length (components/datasets/vlm/collate_fns.py:1295), and packed to `pack_size`."""
    plan = read({**VISION, **further})
    assert plan.options.get("seq_len") == seq_len
    assert ("seq_len" in plan.assumed) is (seq_len is None)
    assert plan.unsupported.keys() == unsupported


@pytest.mark.parametrize(
    ("load", "adapt", "loaded", "unsupported"),
    [
        ("FastLanguageModel", "FastLanguageModel", "", set()),
        ("FastLanguageModel", "FastVisionModel", "", {"lora.call"}),
        ("FastModel", "FastLanguageModel", "", {"lora.call"}),
        ("FastModel", "FastVisionModel", "", set()),
        ("FastLanguageModel", "FastLanguageModel", ", return_logits=True", {"load.return_logits"}),
        ("FastLanguageModel", "FastLanguageModel", ", return_logits=False", set()),
        ("FastModel", "FastModel", ", auto_model=AutoModelForCausalLM", set()),
        ("FastModel", "FastModel", ", auto_model=AutoModelForSequenceClassification", {"load.auto_model"}),
    ],
)
def test_what_unsloth_loads_and_adapts(load: str, adapt: str, loaded: str, unsupported: set[str]) -> None:
    plan = read_text(UNSLOTH.format(load=load, adapt=adapt, loaded=loaded), file="run.py")
    keys = {"lora.call", "load.return_logits", "load.auto_model"}
    assert plan.unsupported.keys() & keys == unsupported
    assert "trainer.call" in plan.read


@pytest.mark.parametrize(
    ("loaded", "assumed"),
    [(", trust_remote_code=True", True), (", trust_remote_code=True, unsloth_force_compile=True", False), ("", False)],
)
def test_unsloth_compiles_no_code_of_a_repository(loaded: str, assumed: bool) -> None:
    """`trust_remote_code and _config_uses_remote_code` (models/loader.py:3067)."""
    plan = read_text(UNSLOTH.format(load="FastModel", adapt="FastModel", loaded=loaded), file="run.py")
    assert ("code" in plan.assumed) is assumed


def test_a_file_of_settings_that_is_not_read() -> None:
    plan = read_values({"config": "sft_config.yaml"}, file="run.sh", tool="trl", kind="command", program="trl sft")
    assert plan.unsupported.keys() == {"config"}


@pytest.mark.parametrize(
    ("tool", "key", "at"),
    [
        ("trl", "log_level", "transformers 5.24.0, training_args.py:1039"),
        ("torchtune", "log_level", "torchtune 0.7.0, recipes/full_finetune_distributed.py:194"),
        ("unsloth", "args.dataset_kwargs.add_special_tokens", "trl 1.16.0, trainer/sft_config.py:184"),
        ("peft", "layers_pattern", "tuners/lora/config.py:729"),
    ],
)
def test_a_key_has_the_line_of_its_own_tool(tool: str, key: str, at: str) -> None:
    """A launcher has options of the same name, and a key in a mapping has the line of the mapping."""
    known = facts(tool).known(key)  # type: ignore[arg-type]
    assert known is not None
    assert known.at == at


@pytest.mark.parametrize(
    ("recipe", "target", "unsupported"),
    [
        ("TrainFinetuneRecipeForNextTokenPrediction", "NeMoAutoModelForCausalLM.from_pretrained", set()),
        ("TrainFinetuneRecipeForNextTokenPrediction", "NeMoAutoModelForCausalLM.from_config", set()),
        ("TrainFinetuneRecipeForSequenceClassification", "NeMoAutoModelForCausalLM.from_pretrained", {"recipe"}),
        (
            "TrainFinetuneRecipeForNextTokenPrediction",
            "NeMoAutoModelForSequenceClassification.from_pretrained",
            {"model._target_"},
        ),
    ],
)
def test_programs_and_heads_of_nemo(recipe: str, target: str, unsupported: set[str]) -> None:
    model = {"_target_": f"nemo_automodel.{target}", "pretrained_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    plan = read({**VISION, "recipe": recipe, "model": model})
    assert plan.unsupported.keys() == unsupported


@pytest.mark.parametrize(
    ("model", "stages", "own", "unsupported"),
    [
        ("meta-llama/Llama-3.2-1B", 2, {}, False),
        ("meta-llama/Llama-3.2-1B", 2, {"patch_inner_model": False}, True),
        ("meta-llama/Llama-3.2-1B", 1, {"patch_inner_model": False}, False),
        ("zai-org/GLM-4.5-Air", 4, {"patch_inner_model": False, "patch_causal_lm_model": False}, False),
    ],
)
def test_which_forward_a_stage_of_nemo_runs(model: str, stages: int, own: dict[str, bool], unsupported: bool) -> None:
    """By default its own (`patch_inner_model: bool = True`, components/distributed/pipelining/config.py:87)."""
    target = {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path": model}
    plan = read(
        {
            "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
            "model": target,
            "step_scheduler": {"local_batch_size": 4},
            "distributed": {"strategy": "fsdp2", "pp_size": stages, "pipeline": {"pp_schedule": "1f1b", **own}},
        }
    )
    assert any(key.startswith("distributed.pipeline.patch") for key in plan.unsupported) is unsupported
