"""Whole tiny models loaded in a format by transformers, on the CPU: which modules it converts, and each tensor it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.storage import is_skipped, keys_to_not_convert, parse_quant, quantized_modules, stored

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BitsAndBytesConfig, FineGrainedFP8Config  # noqa: E402
from transformers.integrations import replace_with_bnb_linear  # noqa: E402
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert  # noqa: E402
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
LLAMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 128}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 96}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 64}
MODELS = {
    "llama-untied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", LLAMA),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
    "t5-tied": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": True}),
    "t5-untied": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}),
    "t5-gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert-classifier": ("BertForSequenceClassification", SMALL),
    "bert-masked": ("BertForMaskedLM", SMALL),
    "gemma2": ("Gemma2ForCausalLM", LLAMA),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**LLAMA, "moe_intermediate_size": 128, "num_experts": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", SMALL),
}


def build(name: str, device: str = "meta") -> torch.nn.Module:
    class_name, sizes = MODELS[name]
    cls = getattr(transformers, class_name)
    with torch.device(device):
        return cls(cls.config_class(**sizes)).to(torch.bfloat16)


def kind(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.Linear):
        return "Linear" if type(module) is torch.nn.Linear else "LinearSubclass"
    name = type(module).__name__
    return "Experts" if name.endswith("Experts") else name


def planned_modules(quant_name: str, model: torch.nn.Module, **options: object) -> set[str]:
    output = model.get_output_embeddings()
    return quantized_modules(
        parse_quant(quant_name, **options),  # type: ignore[arg-type]
        modules=[(name, kind(module)) for name, module in model.named_modules()],
        ties=model.all_tied_weights_keys,
        output_embedding=next((name for name, module in model.named_modules() if module is output), None),
        last_parameter=list(model.named_parameters())[-1][0],
        keep_in_fp32=tuple(model._keep_in_fp32_modules or ()),
        model_type=model.config.model_type,
    )


@pytest.mark.parametrize("name", MODELS)
def test_default_list_is_that_of_transformers(name: str) -> None:
    model = build(name)
    output = model.get_output_embeddings()
    planned = keys_to_not_convert(
        ties=model.all_tied_weights_keys,
        output_embedding=next((n for n, m in model.named_modules() if m is output), None),
        last_parameter=list(model.named_parameters())[-1][0],
    )
    assert planned == set(get_keys_to_not_convert(model))


@pytest.mark.parametrize("pattern", ["layer.1", "layer.*", "mlp.gate", "gate", "fc1", "a.mlp.gate|fc1", "layer.1.", r"\w"])
@pytest.mark.parametrize("name", ["layer.1", "layer.1.attn", "layer.11.attn", "mlp.gate_proj", "a.mlp.gate", "b.fc1", "fc11"])
def test_a_pattern_skips_as_in_transformers(name: str, pattern: str) -> None:
    assert is_skipped(name, [pattern]) is not should_convert_module(name, [pattern])


def replaced_by_bnb(model: torch.nn.Module, skip: list[str] | None) -> set[str]:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    left = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, modules_to_not_convert=left, quantization_config=config)
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.mark.parametrize("name", MODELS)
def test_modules_that_bitsandbytes_converts(name: str) -> None:
    model = build(name)
    planned = planned_modules("nf4", model)
    assert planned
    assert planned == planned_modules("int8", model)
    assert planned == replaced_by_bnb(model, None)


@pytest.mark.parametrize(
    "skip",
    [
        [],
        ["lm_head"],
        ["q_proj", "down_proj"],
        ["model.layers.1"],
        ["model.layers.1.mlp", "gate"],
        [r"model\.layers\.\d+\.self_attn"],
        ["layers"],
        ["proj"],
        ["model.layers.*.mlp|lm_head"],
    ],
)
@pytest.mark.parametrize("name", ["llama-untied", "mixtral", "t5-untied", "gemma2"])
def test_a_skip_list_replaces_the_default(name: str, skip: list[str]) -> None:
    model = build(name)
    planned = planned_modules("nf4", model, skip_modules=tuple(skip))
    assert planned == replaced_by_bnb(model, skip)


def test_what_people_get_wrong() -> None:
    assert "classifier" in planned_modules("nf4", build("bert-classifier"))  # its last parameter is a bias
    assert "lm_head" not in planned_modules("nf4", build("llama-untied"))
    assert "lm_head" in planned_modules("nf4", build("llama-untied"), skip_modules=("q_proj",))
    assert not any(name.endswith(("wo", "lm_head")) for name in planned_modules("nf4", build("t5-untied")))
    moe = planned_modules("nf4", build("mixtral"))
    assert {name.rpartition(".")[2] for name in moe} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def tensors_of(model: torch.nn.Module, module_name: str) -> set[tuple[int, ...]]:
    """Bytes and dims of what a converted module keeps besides its bias."""
    module = model.get_submodule(module_name)
    kept = [module.weight.data]
    if isinstance(module, bnb.nn.Linear8bitLt):
        kept.append(module.weight.SCB)
    else:
        state = module.weight.quant_state
        kept += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return {(t.untyped_storage().nbytes(), *t.shape) for t in kept}


@pytest.mark.parametrize("quant_name", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_every_tensor_of_a_model_loaded_by_transformers(name: str, quant_name: str, tmp_path: Path) -> None:
    source = build(name, "cpu")
    source.save_pretrained(tmp_path)
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if quant_name == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    loaded = type(source).from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    quant = parse_quant(quant_name, double_quant=quant_name == "nf4")
    planned = planned_modules(quant_name, source, double_quant=quant_name == "nf4")
    converted = {n for n, m in loaded.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}
    assert planned == converted
    for module_name in planned:
        module = source.get_submodule(module_name)
        allocations = stored(quant, shape=tuple(module.weight.shape), dtype="bf16", kind=kind(module))
        assert {(a.nbytes, *a.dims) for a in allocations} == tensors_of(loaded, module_name)


FP8 = {
    "whole tiles": ("mixtral", {}),
    "partial tiles stay in bf16": ("llama-untied", {"hidden_size": 192}),
    "mixed": ("llama-tied", {"intermediate_size": 320}),
}


@pytest.mark.parametrize("case", FP8)
def test_fp8_parameters_of_a_loaded_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None)  # it asks for a GPU
    name, sizes = FP8[case]
    monkeypatch.setitem(MODELS, name, (MODELS[name][0], {**MODELS[name][1], **sizes}))
    source = build(name, "cpu")
    source.save_pretrained(tmp_path)
    loaded = type(source).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config())
    short = {torch.float8_e4m3fn: "fp8_e4m3", torch.bfloat16: "bf16", torch.float32: "fp32"}
    expected = {n: (short[p.dtype], tuple(p.shape)) for n, p in loaded.named_parameters()}

    converted = planned_modules("fp8", source)
    planned = {}
    for parameter, tensor in source.named_parameters():
        quant = parse_quant("fp8") if parameter.rpartition(".")[0] in converted and tensor.ndim > 1 else None
        for a in stored(quant, shape=tuple(tensor.shape), dtype="bf16"):
            planned[fp8_name(parameter, a)] = (a.dtype, a.dims)
    assert planned == expected


def fp8_name(parameter: str, allocation: Allocation) -> str:
    """`….weight` and its scales `….weight_scale_inv`; `….gate_up_proj` and `….gate_up_proj_scale_inv`."""
    return parameter + allocation.name.removeprefix("weight")


def test_fp8_checkpoint_with_partial_tiles_is_fp8() -> None:
    # DeepSeek-V3's kv_a_proj_with_mqa: 576 × 7168 is 4.5 × 56 tiles, its scales are 5 × 56
    weight, scales = stored(parse_quant("fp8", pre_quantized=True), shape=(576, 7168), dtype="bf16")
    assert (weight.dtype, weight.nbytes, scales.dims) == ("fp8_e4m3", 576 * 7168, (5, 56))


def test_mxfp4_experts_hold_the_dense_experts() -> None:
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=64, intermediate_size=96, num_local_experts=3)
    with torch.device("meta"):
        dense, packed = GptOssExperts(config), Mxfp4GptOssExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        shape = tuple(getattr(dense, name).shape)
        weight, scales = stored(parse_quant("mxfp4"), shape=shape, dtype="bf16", kind="Experts")
        assert (weight.dtype, weight.dims) == ("uint8", tuple(getattr(packed, name).shape))
        blocks = torch.zeros(*scales.dims, weight.dims[2] // scales.dims[2], dtype=torch.uint8)
        assert convert_moe_packed_tensors(blocks, torch.zeros(scales.dims, dtype=torch.uint8)).shape == shape
    with pytest.raises(RefusedError, match="gpt_oss"):
        planned_modules("mxfp4", build("mixtral"))
