"""Arguments of components: one that the released function or class does not have is not supported; the nearest is named."""

from __future__ import annotations

import inspect

import pytest

from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import Tool
from peftplan.job.configs.read import read_values

ALPACA = {"dataset._component_": "torchtune.datasets.alpaca_dataset"}
SQUAD = {"validation_dataset._target_": "nemo_automodel.components.datasets.llm.squad.make_squad_dataset"}


@pytest.mark.parametrize(
    ("tool", "values", "key", "near"),
    [
        ("torchtune", ALPACA, "dataset.packd", "packed"),
        ("torchtune", ALPACA, "dataset.delimeter", "delimiter"),  # of datasets' builder of CSV files, behind **kwargs
        ("torchtune", {}, "lr_scheduler.num_warmup_steps", ""),
        (
            "torchtune",
            {"tokenizer._component_": "torchtune.models.llama3.llama3_tokenizer"},
            "tokenizer.max_seq_length",
            "max_seq_len",
        ),
        ("nemo-automodel", {}, "step_scheduler.global_batch", "global_batch_size"),
        ("nemo-automodel", {}, "packed_sequence.packed_seq", "packed_sequence_size"),
        ("nemo-automodel", {}, "checkpoint.enable", "enabled"),
        ("nemo-automodel", {}, "dataloader.num_worker", "num_workers"),
        ("nemo-automodel", SQUAD, "validation_dataset.splt", "split"),
        ("peft", {"peft_type": "LORA"}, "lora_alfa", "lora_alpha"),
        ("peft", {"peft_type": "IA3"}, "lora_alpha", ""),
    ],
)
def test_an_argument_that_the_component_does_not_have(tool: Tool, values: dict[str, object], key: str, near: str) -> None:
    why = read_values({**values, key: 2}, file="a.yml", tool=tool).unsupported[key].why
    assert why.startswith("not an argument of ")
    assert why.endswith(f"{near}?") or f"did you mean {near} " in why if near else "?" not in why


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("dataset._component_", "torchtune.datasets.alpaca_datset"),
        ("loss._component_", "torchtune.modules.loss.LinearCrossEntropy"),
        ("model._component_", "torchtune.models.llama3.llama3_9b"),
    ],
)
def test_a_component_that_the_tool_does_not_have(key: str, component: str) -> None:
    """A loss and a model by such a name were counted: the loss as cross entropy, the model by its checkpoint's folder."""
    why = read_values({key: component}, file="a.yml", tool="torchtune").unsupported[key].why
    assert why.startswith("not a component of torchtune; did you mean ")


def test_arguments_of_the_user_s_own_function_are_not_known() -> None:
    plan = read_values({"dataset._component_": "my_data.rows", "dataset.anything": 2}, file="a.yml", tool="torchtune")
    assert plan.unsupported == {}


def test_fields_of_peft_are_those_of_its_own_classes() -> None:
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    components = facts("peft").components
    assert {kind.name for kind in mapping} == set(components)
    for kind, config in mapping.items():
        assert set(components[kind.name][1].split()) == set(inspect.signature(config).parameters), kind


def test_a_field_of_peft_that_is_unknown_is_left_out_of_the_method() -> None:
    """peft 0.21.2 warns that it ignores the field, and takes the others (`PeftConfigMixin.from_peft_type`)."""
    plan = read_values({"peft_type": "LORA", "r": 4, "rr": 9, "target_modules": ["q_proj"]}, file="adapter_config.json")
    assert plan.options["peft_config"] == {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
