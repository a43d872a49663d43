"""Models of which accelerate's default wrap policy does not find all classes, against accelerate and transformers themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace

import pytest

import peftplan
from peftplan.arch import catalogue
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.wrapped import ROOT, family_of, is_beside_text
from peftplan.errors import RefusedError
from peftplan.job.prepare import prepare
from peftplan.parameters import Parameter
from peftplan.versions import FSDP_SKIPS_ABSENT_CLASSES

MODELS = ("gemma-3-4b", "gemma-4-31b", "llava-1.5-7b", "paligemma-3b-pt-224")
WITH_FORMULA = ("gemma-3-4b", "gemma-4-31b", "llava-1.5-7b")
BY_DEFAULT = Distributed(strategy="fsdp2", gpus=8)
OLDER = FSDP_SKIPS_ABSENT_CLASSES.before


@pytest.mark.parametrize("name", MODELS)
def test_classes_that_a_model_lacks(name: str) -> None:
    """accelerate leaves them out; an older one refuses them. Units are those that its policy makes."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    fsdp = pytest.importorskip("accelerate.utils.fsdp_utils")
    wrap = pytest.importorskip("torch.distributed.fsdp.wrap")
    job = {"method": "lora", "gpus": 8, "strategy": "fsdp2"}
    with pytest.raises(RefusedError) as refusal:
        peftplan.estimate(name, **job, accelerate=OLDER)
    entry = catalogue.find(name)
    assert entry is not None
    config = transformers.AutoConfig.for_model(**entry.facts()["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)

    def policy(classes: list[str] | None) -> Callable[[object], bool]:
        plugin = SimpleNamespace(auto_wrap_policy=wrap.transformer_auto_wrap_policy, transformer_cls_names_to_wrap=classes)
        return fsdp.fsdp2_prepare_auto_wrap_policy(plugin, model)

    text = str(refusal.value)
    missing, accepted = (
        text.partition("layer class ")[2].split()[0],
        text.partition("--transformer-cls-names-to-wrap ")[2].split()[0],
    )
    assert missing in model._no_split_modules
    assert missing not in {type(module).__name__ for module in model.modules()}
    with pytest.raises(ValueError, match=f"Could not find the transformer layer class {missing}"):
        policy([missing])
    assert policy(accepted.split(","))
    stated = peftplan.estimate(name, **job, transformer_cls_names_to_wrap=accepted, accelerate=OLDER)
    assert (stated.peaks is not None) == (name in WITH_FORMULA)
    assert (peftplan.estimate(name, **job).peaks is not None) == (name in WITH_FORMULA)
    if FSDP_SKIPS_ABSENT_CLASSES.after(version("accelerate")):
        return
    named = policy(None)
    units = [f"{name}." for name, module in model.named_modules() if named(module) and is_beside_text(f"{name}.")]
    for unit in units:
        parameter = next(name for name, _ in model.named_parameters() if name.startswith(unit))
        of_layers = re.sub(r"\.\d+\.", ".{}.", parameter)
        assert family_of(Parameter(of_layers, (1,), 1, "bf16", False, "base", (), ""), BY_DEFAULT) != ROOT


def test_peft_refuses_classes_that_a_model_lacks_with_fsdp1() -> None:
    """peft's wrap policy looks for all of them, with any accelerate; full fine-tuning uses accelerate's."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    other = pytest.importorskip("peft.utils.other")
    entry = catalogue.find("gemma-3-4b")
    assert entry is not None
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**entry.facts()["config"]))
    with pytest.raises(TypeError, match="Could not find the transformer layer class to wrap in the model"):
        other.fsdp_auto_wrap_policy(model)
    job = {"gpus": 8, "strategy": "fsdp1", "adapter_dtype": "bf16"}
    with pytest.raises(RefusedError, match=r"peft .* refuses it with FSDP1: .*SiglipTextEmbeddings"):
        peftplan.estimate("gemma-3-4b", method="lora", **job)
    assert peftplan.estimate("gemma-3-4b", method="full", gpus=8, strategy="fsdp1").peaks is not None


@pytest.mark.parametrize("name", ["LlamaDecoderLayer", "Qwen2DecoderLayer"])
def test_a_class_of_another_model_is_warned_of(name: str) -> None:
    """As accelerate looks for it: in no Qwen 2 is a layer of Llama."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    dataclasses = pytest.importorskip("accelerate.utils.dataclasses")
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_hidden_layers=1, hidden_size=64, vocab_size=128))
    is_there = dataclasses.get_module_class_from_name(model, name) is not None
    job = {"method": "lora", "gpus": 8, "strategy": "fsdp2", "transformer_cls_names_to_wrap": name}
    warned = any(
        "Could not find the transformer layer class" in text for text in peftplan.estimate("qwen2.5-0.5b", **job).warnings
    )
    assert warned is not is_there


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("distilbert-base-uncased", "TransformerBlock"),
        ("gpt2", "GPT2Block"),
        ("gemma-7b", "Gemma2DecoderLayer"),
        ("qwen2.5-0.5b", "Qwen2MoeDecoderLayer"),
        ("phi-2", "Phi3DecoderLayer"),
        ("qwen3-0.6b", "Qwen3NextDecoderLayer"),
        ("qwen3-0.6b", "Qwen3VLTextDecoderLayer"),
        ("falcon-7b", "FalconH1DecoderLayer"),
        ("falcon-7b", "FalconMambaBlock"),
        ("gpt-neo-125m", "GPTNeoXLayer"),
    ],
)
def test_names_that_begin_like_those_of_another_model_are_told_apart(model: str, name: str) -> None:
    """The witness is the file of transformers in which the model's classes are."""
    transformers = pytest.importorskip("transformers")
    code = import_module(getattr(transformers, prepare(model, method="full").architecture.model_class).__module__)
    job = {"method": "full", "gpus": 8, "strategy": "fsdp2", "transformer_cls_names_to_wrap": name}
    warned = any("Could not find the transformer layer class" in text for text in peftplan.estimate(model, **job).warnings)
    assert warned is not hasattr(code, name)


@pytest.mark.parametrize(("policy", "is_read"), [("size", True), ("transformer", False), (None, False), ("none", False)])
def test_a_number_of_parameters_is_read_with_the_policy_by_size_alone(policy: str | None, is_read: bool) -> None:
    """As accelerate's plugin does."""
    plugins = pytest.importorskip("accelerate.utils.dataclasses")
    torch = pytest.importorskip("torch")
    words = {"size": "size_based_wrap", "none": "no_wrap"}
    plugin = plugins.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=words.get(policy or "", "transformer_based_wrap"),
        transformer_cls_names_to_wrap=["Linear"],
        min_num_params=7,
    )
    plugin.set_auto_wrap_policy(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    policy_of = getattr(plugin.auto_wrap_policy, "keywords", {})
    assert ("min_num_params" in policy_of) is is_read
    job = {"method": "lora", "gpus": 8, "strategy": "fsdp2", "wrap_policy": policy, "min_num_params": 7}
    warned = any("min_num_params" in text for text in peftplan.estimate("qwen2.5-0.5b", **job).warnings)
    assert warned is not is_read


def test_a_model_with_all_classes_is_not_refused() -> None:
    """Gemma 4 E4B has the audio tower whose class Gemma 4 31B lacks."""
    assert peftplan.estimate("gemma-4-e4b-it", method="lora", gpus=8, strategy="fsdp2").peaks is None


def test_the_head_of_an_adapted_model_is_a_unit_of_its_own_which_liger_does_not_call() -> None:
    """The witnesses are accelerate's search for the final norm, and an older accelerate, which leaves both to the root."""
    fsdp, peft = pytest.importorskip("accelerate.utils.fsdp_utils"), pytest.importorskip("peft")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=128))
        assert fsdp._find_final_norm(model) is not None
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert fsdp._find_final_norm(adapted) is None
    job = {"method": "lora", "gpus": 8, "strategy": "fsdp2", "loss": "liger"}
    with pytest.raises(RefusedError, match=r"mixed torch\.Tensor and DTensor"):
        peftplan.estimate("llama-3.2-1b", **job)
    assert peftplan.estimate("llama-3.2-1b", **job, accelerate="1.12").peaks is None
    assert peftplan.estimate("llama-3.2-1b", **job | {"method": "full"}).peaks is not None
