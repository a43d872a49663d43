"""Temporaries of a merge against what peft's `merge_and_unload` really allocates, on the CPU and on the path of a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peftplan  # noqa: E402
from peftplan.errors import RefusedError  # noqa: E402
from tests.deployment.merges import cpu_temporaries, meta_temporaries  # noqa: E402

CONFIG: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "num_key_value_heads": 4, "vocab_size": 64, "tie_word_embeddings": False}  # fmt: skip
ONE = ["down_proj"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "vera": ("VeraConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "boft": ("BOFTConfig", {}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 100}),
}
NUMBERS = 32
"""Python's numbers are tensors of 8 bytes on the CPU, which the formulas leave out."""


def adapted(method: str, targets: list[str], dtype: Any, device: str) -> Any:
    """A model whose adapter is in fp32, as peft loads it."""
    cls, options = METHODS[method]
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(dtype)
        return (
            peft.get_peft_model(model, getattr(peft, cls)(target_modules=list(targets), **options)).eval().requires_grad_(False)
        )


def ours(method: str, targets: list[str], dtype: str) -> dict[str, Any]:
    """What peftplan states, by place."""
    options = {k: v for k, v in METHODS[method][1].items() if k not in ("use_dora",)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **CONFIG}
    serving = peftplan.serving(config, method=method, target_modules=targets, dtype=dtype, **options)
    return {merge.place: merge for merge in serving.merges}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("target", ["down_proj", "up_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_one_module_per_layer(method: str, target: str, dtype: str) -> None:
    """The first layer's module is merged while all adapter tensors are alive: equal but for Python's numbers."""
    merges, torch_dtype = ours(method, [target], dtype), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    on_cpu = cpu_temporaries(lambda: adapted(method, [target], torch_dtype, "cpu"))
    assert 0 <= on_cpu - merges["cpu"].need.num_bytes <= NUMBERS
    if method != "boft":  # peft computes BOFT's permutation from values, which meta tensors lack
        on_gpu = meta_temporaries(adapted(method, [target], torch_dtype, "meta"))
        assert 0 <= merges["gpu"].need.num_bytes - on_gpu < 4 * 512, "each tensor rounded up to 512"


def test_several_modules() -> None:
    """peft drops each module's adapter when it is merged: our sum of both is above by no more than the adapter."""
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    for method in ("lora", "dora"):
        merge = ours(method, targets, "fp32")["cpu"]
        theirs = cpu_temporaries(lambda method=method: adapted(method, targets, torch.float32, "cpu"))
        assert 0 <= merge.need.num_bytes - theirs <= merge.adapter


def test_base_and_adapter_are_what_is_loaded() -> None:
    model = adapted("lora", ONE, torch.bfloat16, "meta")
    merge = ours("lora", ONE, "bf16")["cpu"]
    own = [p.nbytes for name, p in model.named_parameters() if "lora_" in name]
    assert merge.adapter == sum(own)
    tables = sum(
        4 * buffer.numel() for buffer in model.buffers()
    )  # rotary tables stay in fp32 where a model is loaded in 16 bits
    assert merge.base == sum(parameter.nbytes for parameter in model.parameters()) - sum(own) + tables


def test_stacked_experts() -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **CONFIG, "num_local_experts": 4,
              "num_experts_per_tok": 2}  # fmt: skip
    with torch.device("meta"):
        base = transformers.MixtralForCausalLM(transformers.AutoConfig.for_model(**config)).to(torch.bfloat16)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["w1", "w2", "w3"], r=4)).eval().requires_grad_(False)
    merge = {m.place: m for m in peftplan.serving(config, target_modules=["w1", "w2", "w3"], r=4, dtype="bf16").merges}["gpu"]
    assert merge.need.module.endswith("gate_up_proj")
    assert merge.need.num_bytes == meta_temporaries(model)


def test_fused_experts_are_told_by_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 calls the class `Glm4MoeNaiveMoe`; its merge ended in a KeyError."""
    config = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], **CONFIG, "n_routed_experts": 4,
              "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1}  # fmt: skip
    now = peftplan.serving(config, r=4).merges
    modeling = transformers.models.glm4_moe.modeling_glm4_moe
    monkeypatch.setattr(modeling, "Glm4MoeExperts", type("Glm4MoeNaiveMoe", (modeling.Glm4MoeExperts,), {}))
    assert peftplan.serving(config, r=4).merges == now


def test_by_hand() -> None:
    # Llama-2-7B, gate_proj of 11008 × 4096: on a GPU B @ A and its scaled copy in fp32; on the CPU Δ and two copies of W in fp32
    merges = {merge.place: merge for merge in peftplan.serving("llama-2-7b", method="lora", r=16).merges}
    assert merges["gpu"].need.num_bytes == 2 * 4 * 11008 * 4096
    assert merges["cpu"].need.num_bytes == 3 * 4 * 11008 * 4096
    assert merges["cpu"].base == 2 * 6_738_415_616 + 2 * 4 * 64  # and two rotary tables of 64 in fp32


def test_into_weights_of_4_bits_by_hand() -> None:
    """NF4 with double quantization: dequantized in bf16, Δ and the sum in fp32, the sum again on the GPU, and its new weight."""
    merges = {m.place: m for m in peftplan.serving("llama-2-7b", method="qlora", r=16).merges}
    merge, n = merges["gpu_quantized"], 11008 * 4096
    blocks = n // 64
    # weight, absmax, code, nested absmax (11,008 B), nested code, offset; and twice the absmax in fp32 as it is quantized itself
    new = n // 2 + blocks + 512 + 22 * 512 + 1024 + 512 + 2 * 4 * blocks
    assert merge.need.num_bytes == 2 * n + 4 * n + 4 * n + 4 * n + new
    assert merge.need.host_bytes == 4 * n
    assert merge.base < merges["gpu"].base / 3


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("prefix-tuning", {"num_virtual_tokens": 4}, "virtual tokens"),
        ("prompt-tuning", {"num_virtual_tokens": 4}, "virtual tokens"),
        ("p-tuning", {"num_virtual_tokens": 4}, "virtual tokens"),
        ("houlsby", {}, "non-linearity"),
        ("full", {}, "nothing to merge"),
    ],
)
def test_what_has_no_merge_is_refused(method: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        peftplan.serving("llama-2-7b", method=method, merge=True, **options)
    serving = peftplan.serving("llama-2-7b", method=method, **options)
    assert serving.merges == ()
    assert why in serving.refused["merge_memory"]


def test_a_merge_into_stored_weights_that_is_not_described() -> None:
    serving = peftplan.serving("llama-2-7b", method="ia3", quant="nf4")
    assert [merge.place for merge in serving.merges] == ["cpu", "gpu"]
    assert "stored as nf4" in serving.refused["merge_memory.gpu_quantized"]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "ia3", "fourierft"])
def test_a_transposed_weight(method: str) -> None:
    """GPT-2's Conv1D holds (in, out)."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 128, "n_layer": 2, "n_head": 2,
              "vocab_size": 64, "n_positions": 32}  # fmt: skip
    cls, options = METHODS[method]
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        base = transformers.GPT2LMHeadModel(transformers.AutoConfig.for_model(**config)).to(torch.bfloat16)
        peft_config = getattr(peft, cls)(target_modules=["c_fc"], fan_in_fan_out=True, **options)
        model = peft.get_peft_model(base, peft_config).eval().requires_grad_(False)
    ours = {k: v for k, v in options.items() if k != "use_dora"}
    merges = {m.place: m for m in peftplan.serving(config, method=method, target_modules=["c_fc"], dtype="bf16", **ours).merges}
    assert 0 <= merges["gpu"].need.num_bytes - meta_temporaries(model) < 4 * 512


def test_lora_on_an_embedding() -> None:
    model = adapted("lora", ["embed_tokens"], torch.bfloat16, "meta")
    merge = ours("lora", ["embed_tokens"], "bf16")["gpu"]
    assert merge.need.module == "model.embed_tokens.weight"
    assert merge.need.num_bytes == meta_temporaries(model)


def test_rotated_embeddings_are_not_described() -> None:
    serving = peftplan.serving("llama-2-7b", method="oft", target_modules=["embed_tokens"])
    assert serving.merges == ()
    assert "OFT into model.embed_tokens.weight" in serving.refused["merge_memory"]
