"""What files of NeMo Automodel mean."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.arch import catalogue
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.kernels import named_kernels
from tests.job.configs.files import read


def test_nemo_builds_some_models_itself() -> None:
    """Classes in its registry are modules of its own, unless `force_hf`. Dense Llama, Qwen2 and Qwen3 have formulas as it builds
    them, and others as transformers does."""
    config = {
        "model": {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"},
        "step_scheduler": {"local_batch_size": 1},
    }
    for name, force_hf, expected, trainer in (
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", None, ["model"], "automodel"),
        ("meta-llama/Llama-3.2-1B", None, [], "automodel"),
        ("meta-llama/Llama-3.2-1B", True, [], "automodel-hf"),
        ("mistralai/Mistral-7B-v0.1", None, [], "automodel"),
        ("baidu/ERNIE-4.5-21B-A3B-PT", None, ["model"], "automodel"),
        ("baidu/ERNIE-4.5-0.3B-PT", None, [], "automodel"),  # `Ernie4_5ForCausalLM` is not in the registry
        ("zai-org/glm-4-9b-chat-hf", None, [], "automodel"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", None, [], "automodel"),
        ("mistralai/Ministral-3-3B-Instruct-2512", None, [], "automodel"),
    ):
        model = {**config["model"], "pretrained_model_name_or_path": name, "force_hf": force_hf}
        plan = read({**config, "model": model})
        assert (list(plan.unsupported), plan.options["trainer"]) == (expected, trainer)


NEMO_MODEL = {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path": "gpt2"}
NEMO_OWN = NEMO_MODEL | {"pretrained_model_name_or_path": "meta-llama/Llama-3.2-1B"}
NEMO_LORA = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig"}


def of_nemo(distributed: dict[str, object], **more: object) -> ConfigPlan:
    values = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "model": NEMO_MODEL,
        "step_scheduler": {"local_batch_size": 4, "global_batch_size": 64},
        "distributed": distributed,
    }
    return read({**values, **more})


def test_nemo_divides_the_global_batch() -> None:
    """`grad_acc_steps = global_batch_size // (local_batch_size * dp_size)` (components/training/step_scheduler.py)."""
    plan = of_nemo({"strategy": "fsdp2", "dp_size": "none", "tp_size": 1})
    assert plan.unsupported == {}
    assert plan.assumed["gpus"] == "the launcher decides; 8 are assumed"
    assert [plan.options[name] for name in ("trainer", "strategy", "gpus")] == ["automodel", "fsdp2", 8]
    assert plan.options["gradient_accumulation_steps"] == 64 // (4 * 8)
    assert of_nemo({"strategy": "fsdp2", "dp_size": 2}).options["gradient_accumulation_steps"] == 64 // (4 * 2)
    divided = of_nemo({"strategy": "fsdp2", "dp_size": "none", "tp_size": 4})
    assert (divided.options["tp_size"], divided.options["gradient_accumulation_steps"]) == (4, 64 // (4 * 8 // 4))
    assert of_nemo({"strategy": "fsdp2", "dp_size": 2, "tp_size": 4}).options["gpus"] == 2 * 4
    assert "tp_size" not in plan.options


@pytest.mark.parametrize(("dp_size", "gpus"), [("none", 1), (4, 4)])
def test_nemo_is_started_as_its_own_tests_start_it(dp_size: object, gpus: int) -> None:
    """Where the file itself does not say how many processes shard it. The tool reads nothing under `ci` (0.7.0,
    components/launcher/interactive.py:124: as many as there are GPUs), so this is an assumption."""
    plan = of_nemo({"strategy": "fsdp2", "dp_size": dp_size}, ci={"nproc_per_node": 1, "cluster_tag": "gb10"})
    assert (plan.options["gpus"], "strategy" in plan.options) == (gpus, gpus > 1)
    assert ("tests of NeMo Automodel" in plan.assumed.get("gpus", "")) is (gpus == 1)


def test_nemo_runs_gpt_oss_with_flex_attention() -> None:
    """components/models/gpt_oss/model.py: `backend or BackendConfig(attn="flex")`."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "openai/gpt-oss-20b"}
    assert of_nemo({"strategy": "fsdp2"}, model=model, peft=NEMO_LORA).unsupported == {}
    of_experts = {"_target_": "nemo_automodel.components.models.common.utils.BackendConfig", "experts": "gmm"}
    assert "model" in of_nemo({"strategy": "fsdp2"}, model=model | {"backend": of_experts}).unsupported


@pytest.mark.parametrize(
    ("dispatcher", "ci", "nodes", "unsupported"),
    [
        ("hybridep", {"nodes": 8}, (8, 8), set()),
        ("hybridep", {"time": "1"}, (8, 4), set()),
        ("hybridep", {"nodes": 8, "cluster_tag": "gb200"}, (4, 8), set()),
        ("hybridep", {"nodes": 4, "cluster_tag": "h100"}, (8, 4), set()),
        ("deepep", {"time": "1"}, (8, 4), {"model", "model.backend.dispatcher"}),
    ],
)
def test_nemo_divides_experts(dispatcher: str, ci: dict[str, object], nodes: tuple[int, int], unsupported: set[str]) -> None:
    """32 ranks of 8 for each node, or of 4 of GB200, own the experts once. Tokens are sorted for DeepEP by Transformer Engine
    (0.7.0, components/moe/megatron/moe_utils.py:71), beside which attention and linear layers are its own too."""
    backend = {"_target_": "nemo_automodel.components.models.common.BackendConfig", "dispatcher": dispatcher}
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "zai-org/GLM-4.5-Air", "backend": backend}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 32}, model=model, ci=ci)
    assert [plan.options[name] for name in ("ep_size", "gpus", "nodes")] == [32, *nodes]
    assert set(plan.unsupported) == unsupported
    assert ("routing" in plan.assumed) is (dispatcher == "hybridep")


@pytest.mark.parametrize(("packed", "kernels"), [(0, "te-linear"), (816, "te,te-linear")])
def test_nemo_trains_gpt_oss_on_one_gpu(packed: int, kernels: str) -> None:
    """With a backend its attention is Transformer Engine's, or the recipe raises (0.7.0, components/models/gpt_oss/layers.py:79);
    without one it is flex. No recipe reads `parallelizer`."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "openai/gpt-oss-20b", "backend": {"dispatcher": "torch"}}
    beside = {"packed_sequence": {"packed_sequence_size": packed}, "peft": NEMO_LORA | {"target_modules": "*_proj"}}
    plan = of_nemo({"dp_size": 1, "ep_size": None}, model=model, parallelizer={"_target_": "x.y"}, **beside)
    assert (plan.options["kernels"], plan.options.get("padding"), plan.unsupported) == (kernels, False if packed else None, {})


@pytest.mark.parametrize("wraps", [True, False])
def test_nemo_waits_with_gradients_where_it_wraps_the_model(wraps: bool) -> None:
    """`get_sync_ctx` asks whether the model itself is a unit (0.7.0, components/distributed/utils.py:254)."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "zai-org/GLM-4.7-Flash", "backend": {"dispatcher": "deepep"}}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8, "moe": {"wrap_outer_model": wraps}}, model=model)
    assert plan.options.get("sync_each_batch") is (None if wraps else True)


@pytest.mark.parametrize(
    ("model", "backend", "packed", "kernels"),
    [
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "uccl_ep", "experts": "torch_mm"}, 0, "uccl,te-linear"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "uccl_ep", "experts": "te"}, 0, None),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "deepep", "linear": "torch", "experts": "torch_mm"}, 0, "deepep"),
        ("moonshotai/Moonlight-16B-A3B", {"dispatcher": "deepep", "experts": "te"}, 0, "deepep,te-linear,te-experts"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "deepep", "experts": "torch_mm"}, 0, "deepep,te-linear"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "deepep", "rms_norm": "te"}, 0, None),
        ("moonshotai/Moonlight-16B-A3B", {"dispatcher": "deepep", "rms_norm": "te"}, 0, "te-norm,deepep,te-linear"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "deepep", "experts": "torch_mm"}, 1024, "te,deepep,te-linear"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "deepep", "experts": "te"}, 1024, "te,deepep,te-linear,te-experts"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "hybridep", "experts": "te"}, 1024, "te,hybridep,te-linear,te-experts"),
        (
            "Qwen/Qwen3-30B-A3B",
            {"dispatcher": "hybridep", "experts": "te", "te_fp8": {"recipe": "mxfp8"}},
            *(1024, "te,hybridep,te-linear,te-mxfp8"),
        ),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "hybridep", "experts": "torch_mm"}, 1024, None),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"linear": "torch"}, 0, "mamba-ssm,deepep"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"experts": "gmm"}, 848, "te,mamba-ssm,deepep,te-linear"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"experts": "gmm"}, 0, "mamba-ssm,deepep,te-linear"),
        ("moonshotai/Moonlight-16B-A3B", {"dispatcher": "deepep", "experts": "torch_mm"}, 1024, "te,deepep,te-linear"),
        ("openai/gpt-oss-20b", {"dispatcher": "deepep", "experts": "gmm"}, 0, "deepep,te-linear"),
        ("openai/gpt-oss-20b", {"dispatcher": "deepep", "attn": "sdpa"}, 0, None),
        (
            "openai/gpt-oss-20b",
            {"dispatcher": "deepep", "rms_norm": "te", "experts": "te"},
            1024,
            "te-norm,te,deepep,te-linear,te-experts",
        ),
        ("openai/gpt-oss-20b", {"dispatcher": "deepep", "experts": "te"}, 1024, None),
        ("openai/gpt-oss-20b", {"dispatcher": "torch"}, 0, None),
        ("openai/gpt-oss-120b", {"dispatcher": "hybridep", "experts": "torch_mm"}, 0, "hybridep,te-linear"),
        ("Qwen/Qwen3-30B-A3B", {"dispatcher": "deepep", "attn": "magi", "experts": "torch_mm"}, 1024, None),
        (
            "zai-org/GLM-4.7-Flash",
            {"dispatcher": "deepep", "attn": "te", "linear": "te", "experts": "gmm"},
            1024,
            "te,deepep,te-linear",
        ),
        ("zai-org/GLM-4.7-Flash", {"dispatcher": "deepep", "attn": "te", "linear": "te", "experts": "te"}, 1024, None),
        ("zai-org/GLM-4.7-Flash", {"dispatcher": "deepep", "attn": "te", "linear": "te"}, 0, "deepep,te-linear"),
        ("MiniMaxAI/MiniMax-M2.5", {"dispatcher": "hybridep", "experts": "gmm"}, 0, "hybridep,te-linear"),
        ("MiniMaxAI/MiniMax-M2.5", {"dispatcher": "hybridep", "linear": "torch"}, 0, "hybridep"),
        ("MiniMaxAI/MiniMax-M2.5", {"dispatcher": "deepep", "linear": "torch"}, 0, None),
        ("MiniMaxAI/MiniMax-M2.5", {"dispatcher": "hybridep", "experts": "te"}, 0, None),
    ],
)
def test_nemo_exchanges_tokens(model: str, backend: dict[str, str], packed: int, kernels: str | None) -> None:
    """Transformer Engine sorts the tokens, so attention and linear layers are its own too (0.7.0, common/utils.py:521); gmm is
    another name of torch_mm (components/models/common/utils.py:644)."""
    of_model = NEMO_MODEL | {"pretrained_model_name_or_path": model, "backend": backend}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8}, model=of_model, packed_sequence={"packed_sequence_size": packed})
    assert plan.options.get("kernels") == kernels
    assert ("model" in plan.unsupported) is (kernels is None)


def test_nemo_folds_rollouts_into_rows_of_dense_layers() -> None:
    """Rows that are not packed keep torch's attention in Qwen 2, whatever the backend says (0.7.0,
    components/models/qwen2/model.py:74); a row is a prompt and four completions."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "Qwen/Qwen2.5-0.5B", "backend": {"attn": "magi", "rms_norm": "torch"}}
    mock = "nemo_automodel.components.datasets.llm.mock_prefix_tree.build_mock_rollout_dataset"
    dataset = {"_target_": mock, "prompt_len": 64, "completion_len": 32}
    plan = of_nemo({"strategy": "fsdp2"}, model=model, dataset=dataset)
    assert (plan.options["kernels"], plan.options["seq_len"], plan.unsupported) == ("torch-norm", 192, {})


@pytest.mark.parametrize(
    ("model", "backend", "rows", "kernels"),
    [
        ("meta-llama/Llama-3.1-8B", {"rope": "quack"}, 1, "quack.rope"),
        ("Qwen/Qwen2.5-7B", {"rope": "quack", "rms_norm": "quack"}, 1, "quack"),
        ("Qwen/Qwen2.5-7B", {"rope": "quack", "rms_norm": "quack"}, 2, None),
        ("Qwen/Qwen2.5-7B", {"rope": "quack"}, 1, None),
    ],
)
def test_nemo_takes_kernels_of_quack(model: str, backend: dict[str, str], rows: int, kernels: str | None) -> None:
    """Batches of several rows are turned into new tensors (0.7.0, components/models/llama/rope_utils.py:104)."""
    of_model = NEMO_MODEL | {"pretrained_model_name_or_path": model, "backend": backend}
    plan = of_nemo({"strategy": "fsdp2"}, model=of_model, step_scheduler={"local_batch_size": rows})
    assert plan.options.get("kernels") == kernels
    assert ("model.backend.rope" in plan.unsupported) is (kernels is None)


def test_nemo_started_by_skypilot() -> None:
    sky = {"cloud": "kubernetes", "accelerators": "H100:4", "num_nodes": 2, "hf_token": "${HF_TOKEN}"}
    plan = of_nemo(
        {"strategy": "fsdp2", "dp_size": "none"}, skypilot=sky, recipe={"_target_": "nemo_automodel.recipes.llm.train_ft.X"}
    )
    assert plan.unsupported == {}
    assert (plan.options["gpus"], plan.options["nodes"]) == (4, 2)
    assert plan.options["gradient_accumulation_steps"] == 64 // (4 * 4 * 2)


@pytest.mark.parametrize(
    "distributed",
    [
        {"strategy": "megatron_fsdp"},
        {"strategy": "fsdp2", "activation_checkpointing": "selective"},
        {"strategy": "fsdp2", "offload_policy": {"_target_": "torch.distributed.fsdp.CPUOffloadPolicy"}},
    ],
)
def test_what_nemo_shards_otherwise_is_not_supported(distributed: dict[str, object]) -> None:
    assert len(of_nemo(distributed).unsupported) == 1


def test_nemo_packs_quantized_weights_as_floats() -> None:
    """components/quantization/qlora.py (`create_bnb_config`): bfloat16 unless the file says otherwise."""
    plans = [
        of_nemo({"strategy": "fsdp2", "dp_size": "none"}, peft=NEMO_LORA, quantization={"load_in_4bit": True, **storage})
        for storage in ({}, {"bnb_4bit_quant_storage": "uint8"})
    ]
    assert [plan.options["quant_storage"] for plan in plans] == ["bf16", "uint8"]


@pytest.mark.parametrize(
    ("peft", "targets", "excluded"),
    [
        ({}, r"(?:.*\.)?.*_proj", None),
        ({"match_all_linear": True}, "every-linear", None),
        ({"exclude_modules": ["*.out_proj"]}, "every-linear", r"(?:.*\.)?.*\.out_proj"),
        ({"target_modules": ["c_attn"]}, ("c_attn",), None),
    ],
)
def test_nemo_names_its_targets(peft: dict[str, object], targets: object, excluded: str | None) -> None:
    """components/_peft/module_matcher.py (`ModuleMatcher`): all linear layers include the output layer."""
    options = of_nemo({"strategy": "fsdp2"}, peft=NEMO_LORA | peft).options
    assert (options["target_modules"], options.get("exclude_modules")) == (targets, excluded)


def test_nemo_shards_with_fsdp2_unless_one_gpu_runs() -> None:
    """recipes/_dist_utils.py: `_target_` is taken out; components/distributed/model_parallelizer.py
    (`_parallelize_unsharded_fsdp2`): nothing is sharded over one rank."""
    older = {"_target_": "nemo_automodel.components.distributed.fsdp2.FSDP2Manager", "dp_size": "none"}
    assert [of_nemo(older).options[name] for name in ("strategy", "gpus")] == ["fsdp2", 8]
    alone = of_nemo({**older, "dp_size": 1})
    assert ("strategy" in alone.options, alone.unsupported) == (False, {})


def test_nemo_packs_documents_into_rows() -> None:
    """A mask tells documents apart, FlashAttention's metadata, or Transformer Engine in the tool's own modules, which raise
    without it (components/models/llama/model.py: "Packed THD attention requires backend.attn='te'.")."""
    packed = {"packed_sequence": {"packed_sequence_size": 1024}}
    plans = [
        of_nemo({"strategy": "fsdp2"}, model=NEMO_MODEL | {"force_hf": True, **attention}, **packed)
        for attention in ({}, {"attn_implementation": "flash_attention_2"})
    ]
    assert [(plan.options["seq_len"], plan.options.get("padding"), plan.unsupported) for plan in plans] == [
        (1024, True, {}),
        (1024, None, {}),
    ]
    assert of_nemo({"strategy": "fsdp2"}, **packed).unsupported.keys() == {"packed_sequence.packed_sequence_size"}
    flash = {"attn_implementation": "flash_attention_2"}
    for model in (NEMO_OWN | {"force_hf": True}, NEMO_MODEL | {"pretrained_model_name_or_path": "microsoft/phi-4"}):
        alone = of_nemo({"strategy": "fsdp2"}, model=model | flash)
        assert "model.attn_implementation" in alone.unsupported
    of_tool = of_nemo({"strategy": "fsdp2"}, model=NEMO_OWN, **packed)
    assert (of_tool.options["kernels"], of_tool.options["padding"], of_tool.unsupported) == ("te", False, {})
    assert "cuDNN" in of_tool.assumed["attn_implementation"]
    neat = {"packed_sequence_size": 1024, "packing_strategy": "neat"}
    others = ({"model": NEMO_OWN | {"backend": {"attn": "sdpa"}}}, {"packed_sequence": neat})
    for other in others:
        plan = of_nemo({"strategy": "fsdp2"}, **{"model": NEMO_OWN, **packed, **other})
        assert plan.unsupported.keys() == {"packed_sequence.packed_sequence_size"}


def test_ranks_that_share_rows_read_them_once() -> None:
    """`dp_size` is what ranks remain: 8 / 2 read 64 rows in steps of 2."""
    steps = {"global_batch_size": 64, "local_batch_size": 2}
    plan = of_nemo({"strategy": "fsdp2", "cp_size": 2}, model=NEMO_OWN, step_scheduler=steps)
    assert [plan.options[name] for name in ("cp_size", "gpus", "gradient_accumulation_steps")] == [2, 8, 8]
    assert "transformer-engine is installed" in plan.assumed["attn_implementation"]


@pytest.mark.parametrize(
    ("model", "fields", "depths", "unsupported"),
    [
        ("NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16", {"num_nextn_predict_layers": 2, "mtp_use_repeated_layer": True}, 2, set()),
        ("NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16", {"num_nextn_predict_layers": 0}, 0, set()),
        ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {"mtp_loss_scaling_factor": 0.1}, None, set()),
        ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {"num_nextn_predict_layers": 2}, None, {"model.num_nextn_predict_layers"}),
    ],
)
def test_nemo_s_nemotron_predicts_further_tokens(
    model: str, fields: dict[str, object], depths: int | None, unsupported: set[str]
) -> None:
    """As many as its config says, where a file does not; depths that have layers of their own each were not rehearsed."""
    backend = {"attn": "te", "linear": "torch", "rms_norm": "torch_fp32", "experts": "torch_mm", "dispatcher": "torch"}
    named = NEMO_MODEL | {"pretrained_model_name_or_path": f"nvidia/{model}", "backend": backend, **fields}
    plan = of_nemo({"dp_size": 1}, model=named)
    assert (plan.options.get("mtp_depths"), plan.unsupported.keys()) == (depths, unsupported)


@pytest.mark.parametrize(
    ("ep_size", "backend", "kernels"),
    [
        (32, {}, "mamba-ssm,deepep,te-linear"),
        (8, {"attn": "te", "linear": "te", "experts": "gmm", "dispatcher": "deepep"}, "mamba-ssm,deepep,te-linear"),
        (8, {"attn": "te", "linear": "te", "rms_norm": "te"}, "te-norm,mamba-ssm,deepep,te-linear"),
        (64, {}, None),
    ],
)
def test_nemo_divides_the_experts_of_nemotron(ep_size: int, backend: dict[str, str], kernels: str | None) -> None:
    """Without a `backend` the tool takes Transformer Engine and DeepEP where they are installed."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": ep_size}, model=model | ({"backend": backend} if backend else {}))
    assert (plan.options.get("kernels"), plan.unsupported == {}) == (kernels, kernels is not None)


@pytest.mark.parametrize(
    ("backend", "distributed", "known"),
    [
        ({}, {}, True),
        ({"linear": "te"}, {}, False),
        ({"dispatcher": "hybridep"}, {}, False),
        ({"attn": "te"}, {}, False),
        ({}, {"pp_size": 2}, False),
        ({}, {"cp_size": 2}, False),
    ],
)
def test_nemo_builds_the_mixture_of_qwen_3_5(backend: dict[str, str], distributed: dict[str, int], known: bool) -> None:
    parts = {"attn": "sdpa", "linear": "torch", "experts": "gmm", "dispatcher": "deepep", "enable_hf_state_dict_adapter": True}
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "Qwen/Qwen3.5-35B-A3B", "backend": parts | backend}
    model |= {"text_config": {"num_nextn_predict_layers": 1}}
    loss = {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8, **distributed}, model=model, loss_fn=loss, recipe="FinetuneRecipeForVLM")
    assert ("model" not in plan.unsupported) is known
    assert plan.options["mtp_depths"] == 1


def test_rope_fusion_has_no_effect_in_nemo() -> None:
    """components/models/common/utils.py:608: `self.rope_fusion = False`, and dense layers are torch's whatever `linear` says."""
    backend = {"attn": "te", "linear": "te", "rms_norm": "torch_fp32", "rope_fusion": True}
    assert of_nemo({"strategy": "fsdp2"}, model=NEMO_OWN | {"backend": backend}).unsupported == {}


IN_8_BITS = {
    "enabled": True,
    "recipe_name": "tensorwise",
    "enable_fsdp_float8_all_gather": True,
    "precompute_float8_dynamic_scale_for_fsdp": True,
    "filter_fqns": ["lm_head"],
    "emulate": False,
}


@pytest.mark.parametrize(
    ("fp8", "unsupported"),
    [({}, []), ({"recipe_name": "rowwise"}, ["fp8.enabled"]), ({"filter_fqns": []}, ["fp8.enabled"])],
)
def test_layers_in_8_bits_are_not_compiled_under_fsdp2(fp8: dict[str, object], unsupported: list[str]) -> None:
    """_transformers/infrastructure.py: `compile_model` is called for other wrappers alone. Where rows are packed the tool asserts
    that flash-attn is installed, and sets it (kernel_patches.py, `_apply_preload_overrides`)."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "mistralai/Mistral-Nemo-Base-2407"}
    more = {"compile": {"enabled": True}, "packed_sequence": {"packed_sequence_size": 4096}, "fp8": IN_8_BITS | fp8}
    plan = of_nemo({"strategy": "fsdp2"}, model=model, **more)
    assert list(plan.unsupported) == unsupported
    assert plan.options.get("kernels") == (None if unsupported else "torchao-float8")
    assert (plan.options["attn_implementation"], plan.options["padding"]) == ("flash_attention_2", False)
    assert "flash-attn is installed" in plan.assumed["attn_implementation"]
    ddp = of_nemo({"strategy": "ddp"}, model=model, **more)
    assert {"compile.enabled", "fp8.enabled"} <= set(ddp.unsupported)


def test_losses_and_optimizers_of_nemo() -> None:
    """Adam adds decayed weights to copies of all gradients, which go before the roots of the moments are made (torch,
    optim/adam.py)."""
    loss = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"
    adam = {"_target_": "torch.optim.Adam", "weight_decay": 0}
    sharded = {"strategy": "fsdp2"}
    assert of_nemo(sharded, loss_fn={"_target_": loss}, optimizer=adam).unsupported == {}
    peft = {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "dim": 8,
        "target_modules": "*_proj",
        "use_triton": True,
    }
    assert of_nemo(sharded, peft=peft).unsupported == {}
    assert "256 MiB" in of_nemo(sharded, peft=peft).assumed["use_triton"]
    assert of_nemo(sharded, optimizer={**adam, "weight_decay": 0.1}).options["optim"] == "adam"
    flash = of_nemo(sharded, optimizer={"_target_": "flashoptim.FlashAdamW", "master_weight_bits": 32})
    assert (flash.options["optim"], flash.options["optim_args"]) == ("flash_adamw", "master_weight_bits=32")
    plans = [of_nemo(sharded, optimizer={"_target_": "flashoptim.FlashAdamW", "quantize": on}) for on in (True, False)]
    assert [list(plan.unsupported) for plan in plans] == [[], ["optimizer.quantize"]]
    plans = [of_nemo(sharded | {"mp_policy": {"cast_forward_inputs": on}}) for on in (True, False)]
    assert [list(plan.unsupported) for plan in plans] == [[], ["distributed.mp_policy.cast_forward_inputs"]]
    of_te = of_nemo(sharded, loss_fn={"_target_": "nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy"})
    assert (of_te.options["loss"], of_te.unsupported) == ("te-parallel", {})
    fused = of_nemo(sharded, loss_fn={"_target_": "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy"})
    assert (fused.options["loss"], fused.unsupported) == ("cut-apart", {})
    compiled = {"_target_": "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy", "impl": "torch_compile"}
    assert of_nemo(sharded, loss_fn=compiled).unsupported.keys() == {"loss_fn.impl"}
    assert of_nemo(sharded | {"defer_fsdp_grad_sync": False}).options["sync_each_batch"] is True
    alone = of_nemo(sharded | {"defer_fsdp_grad_sync": False}, step_scheduler={"global_batch_size": 8, "local_batch_size": 1})
    assert "sync_each_batch" not in alone.options
    towers = [of_nemo(sharded | {"multimodal": {"frozen_sharding": name}}) for name in ("root", "replicate", "per_layer")]
    assert [plan.options.get("whole_tower") for plan in towers] == [None, True, None]
    assert [bool(plan.unsupported) for plan in towers] == [False, False, True]
    assert alone.read["distributed.defer_fsdp_grad_sync"].why == "a step has one micro batch"


@pytest.mark.parametrize(
    ("fields", "unsupported"),
    [
        ({"scalar_opt": "adamw", "use_triton": False, "flatten": False, "nesterov": False, "mu": 0.95}, []),
        ({"scalar_opt": "lion", "use_triton": True, "nesterov": True}, ["nesterov", "scalar_opt", "use_triton"]),
    ],
)
def test_muon_of_nemo(fields: dict[str, object], unsupported: list[str]) -> None:
    """nemo_automodel 0.7.0, components/optim/optimizer.py (`MuonConfig`)."""
    plan = of_nemo({"strategy": "fsdp2"}, optimizer={"_target_": "dion.Muon", "lr": 5e-4, **fields})
    assert plan.options["optim"] == "dion_muon"
    assert sorted(key.rpartition(".")[2] for key in plan.unsupported) == unsupported


@pytest.mark.parametrize(
    ("fields", "optim_args", "unsupported"),
    [
        ({"master_weights": True, "store_param_remainders": True}, "master_weights=True,store_param_remainders=True", []),
        ({"master_weights": True, "exp_avg_dtype": "torch.float32"}, "master_weights=True", []),
        ({"exp_avg_dtype": "torch.uint8"}, None, ["optimizer.exp_avg_dtype"]),
        (
            {"master_weights": True, "store_param_remainders": True}
            | dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), "torch.bfloat16"),
            "master_weights=True,store_param_remainders=True,exp_avg_dtype=torch.bfloat16,exp_avg_sq_dtype=torch.bfloat16",
            [],
        ),
    ],
)
def test_fused_adam_of_nemo(fields: dict[str, object], optim_args: str | None, unsupported: list[str]) -> None:
    """transformer-engine 2.20.2, pytorch/optimizers/fused_adam.py: defaults without master weights, moments in fp32."""
    plan = of_nemo(
        {"strategy": "fsdp2"}, optimizer={"_target_": "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam", **fields}
    )
    assert (plan.options["optim"], plan.options.get("optim_args"), [*plan.unsupported]) == (
        "te_fused_adam",
        optim_args,
        unsupported,
    )


def test_rows_of_megatron_have_one_length() -> None:
    """components/datasets/llm/megatron_dataset.py:360."""
    dataset = {"_target_": "nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining", "seq_length": 1024}
    plan = of_nemo({"strategy": "fsdp2"}, dataset=dataset)
    assert (plan.options["seq_len"], plan.assumed["seq_len"]) == (1024, "each row has dataset.seq_length tokens")


def test_nemo_says_which_dtype_of_the_checkpoint_it_takes() -> None:
    assert of_nemo({"strategy": "fsdp2"}).assumed["dtype"] == "the checkpoint decides too; bfloat16 is assumed"
    t5 = of_nemo({"strategy": "fsdp2"}, model=NEMO_MODEL | {"pretrained_model_name_or_path": "google-t5/t5-small"})
    assert t5.options["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("fields", "options", "unsupported"),
    [
        ({"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "bfloat16"}, ("bf16", "fp32"), []),
        ({"param_dtype": "torch.bfloat16", "reduce_dtype": "torch.bfloat16"}, ("bf16", "bf16"), []),
        ({"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "float32"}, ("bf16", "fp32"), ["output_dtype"]),
        ({"param_dtype": "bfloat16"}, ("bf16", None), ["_target_"]),
    ],
)
def test_dtypes_of_nemo_units(fields: dict[str, str], options: tuple[str, str], unsupported: list[str]) -> None:
    """Fields of torch's MixedPrecisionPolicy; those that the file leaves out are torch's, not the tool's (its config.py:306)."""
    policy = {"_target_": "torch.distributed.fsdp.MixedPrecisionPolicy", **fields}
    plan = of_nemo({"strategy": "fsdp2", "mp_policy": policy})
    assert (plan.options.get("param_dtype"), plan.options.get("reduce_dtype")) == options
    assert [key.rpartition(".")[2] for key in plan.unsupported] == unsupported


@pytest.mark.parametrize(
    ("dataset", "seq_len"),
    [
        ({"seq_len": 1024}, 1024),
        ({"seq_length": 4096, "padding": "max_length"}, 4096),
        ({"seq_length": 4096, "padding": "do_not_pad"}, None),
        ({"padding": "max_length"}, None),
        ({}, None),
    ],
)
def test_how_long_rows_of_nemo_are(dataset: dict[str, object], seq_len: int | None) -> None:
    """components/datasets/llm/formatting_utils.py pads to `seq_length` with `max_length` alone; `seq_len` is a row's length."""
    plan = of_nemo({"strategy": "fsdp2"}, dataset=dataset)
    assert (plan.options.get("seq_len"), "seq_len" in plan.assumed) == (seq_len, seq_len is None)


def test_backends_of_experts_change_nothing_in_dense_models_of_nemo() -> None:
    """components/models/{llama,qwen2,qwen3}/model.py read `attn`, `rms_norm`, `rope` and `rope_fusion` alone."""
    backend = {"experts": "gmm", "dispatcher": "deepep", "enable_hf_state_dict_adapter": True, "attn": "sdpa"}
    of = {
        name: of_nemo({"strategy": "fsdp2"}, model=NEMO_MODEL | {"pretrained_model_name_or_path": name, "backend": backend})
        for name in ("Qwen/Qwen2.5-7B", "mistralai/Mistral-7B-v0.1")
    }
    assert [len(plan.unsupported) for plan in of.values()] == [0, 3]


def test_what_of_nemo_changes_memory_without_a_formula() -> None:
    """What its LoRA keeps without its autograd function; stages of a data set that makes batches of one row."""
    peft = {**NEMO_LORA, "dim": 8, "target_modules": "*_proj"}
    of = [of_nemo({"strategy": "fsdp2"}, peft=peft | {"use_memory_efficient_lora": value}).unsupported for value in (True, False)]
    assert [[row.effect for row in unsupported.values()] for unsupported in of] == [[], ["raises"]]
    mock = {"_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset", "seq_len": 64}
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": None}
    sharded = {"strategy": "fsdp2", "pp_size": 4}  # rehearsed: the schedule splits one row for 8 micro batches
    unsupported = of_nemo(sharded, dataset=mock, dataloader=loader).unsupported
    assert unsupported.keys() == {"dataset._target_"}
    assert "torch raises ValueError" in unsupported["dataset._target_"].why


@pytest.mark.parametrize(
    ("recipe", "rows", "expected"),
    [
        ("TrainFinetuneRecipeForNextTokenPrediction", None, 1),
        ("TrainFinetuneRecipeForNextTokenPrediction", 2, 2),
        ("BenchmarkingRecipeForNextTokenPrediction", None, 4),
        ("BenchmarkingRecipeForNextTokenPrediction", 2, 4),
    ],
)
def test_a_data_set_makes_its_own_batches(recipe: str, rows: int | None, expected: int) -> None:
    """In place of local_batch_size, which the benchmark writes into it (recipes/llm/benchmark.py:152). Places follow
    each other, for which transformers makes no mask."""
    mock = {"_target_": MOCK, "seq_len": 64} | ({} if rows is None else {"batch_size": rows})
    scheduler = {"local_batch_size": 4, "global_batch_size": 64}
    more = {"model": NEMO_MODEL | {"pretrained_model_name_or_path": "Qwen/Qwen2.5-7B"}, "dataset": mock, "dataloader": UNBATCHED}
    plan = of_nemo({"strategy": "fsdp2"}, recipe=recipe, step_scheduler=scheduler, **more)
    assert not plan.unsupported
    assert (plan.options["batch_size"], plan.options["gradient_accumulation_steps"]) == (expected, 2)
    assert "dataset._target_" in of_nemo({"strategy": "fsdp2", "cp_size": 2}, **more).unsupported


@pytest.mark.parametrize(
    ("optimizer", "ranks", "bound"),
    [
        ({}, 1, None),
        ({"foreach": True}, 1, None),
        ({"amsgrad": False}, 1, None),
        ({"foreach": False}, 1, "at_most"),
        ({"amsgrad": True}, 1, "at_least"),
        ({"foreach": False}, 2, None),  # `_foreach_for_mesh` (components/optim/optimizer.py:669)
    ],
)
def test_what_changes_the_step_of_adam_in_nemo(optimizer: dict[str, bool], ranks: int, bound: str | None) -> None:
    """`false` was read as off, and a third state as a number of the optimizer."""
    of_adam = {"_target_": "torch.optim.Adam", "lr": 1e-5, **optimizer}
    plan = of_nemo({"strategy": "fsdp2", "tp_size": ranks}, model=NEMO_OWN, optimizer=of_adam)
    assert plan.to_dict()["bound"] == bound


def test_rows_of_the_loader_of_nemo() -> None:
    """`loader_kwargs.pop("batch_size", schedule.local_batch_size)` (recipes/_typed_config.py:296); the scheduler that accumulates
    reads its own key (components/training/step_scheduler.py)."""
    sharded: dict[str, object] = {"strategy": "fsdp2"}
    plan = of_nemo(sharded, dataloader={"batch_size": 16})
    assert (plan.options["batch_size"], plan.options["gradient_accumulation_steps"], plan.unsupported) == (16, 2, {})
    pictures = of_nemo(sharded, recipe="FinetuneRecipeForVLM", dataloader={"batch_size": 16})
    assert "dataloader.batch_size" in pictures.unsupported


def test_what_nemo_freezes_of_a_vision_language_model_does_not_train() -> None:
    """The witness counts the parameters of transformers' Gemma 3 whose module NeMo's patterns find (model_utils.py:603)."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    frozen = {"freeze_vision_tower": True, "freeze_language_model": False}
    plan = of_nemo({"strategy": "fsdp2"}, model={"pretrained_model_name_or_path": "google/gemma-3-4b-it"}, freeze_config=frozen)
    entry = catalogue.find("gemma-3-4b-it")
    assert entry is not None
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**entry.facts()["config"]))
    trained = sum(p.numel() for name, p in model.named_parameters() if "vision" not in name.lower())
    assert plan.options["method"] == "partial"
    counted = peftplan.estimate("gemma-3-4b-it", method="partial", trainable=plan.options["trainable"])
    assert counted.trainable_parameters == trained


def test_teachers_of_nemo_have_gpus_of_their_own() -> None:
    """recipes/kd_utils.py (`create_kd_distributed_setups`): the student's ranks come first, and the teacher's hold less: 3.2 B
    weights in bf16 on two, beside 1.2 B weights, gradients and two states in fp32."""
    teacher = {"_target_": NEMO_MODEL["_target_"], "pretrained_model_name_or_path": "meta-llama/Llama-3.2-3B"}
    kd = {
        "recipe": "KnowledgeDistillationRecipeForNextTokenPrediction",
        "model": NEMO_OWN | {"torch_dtype": "float32"},
        "teacher_model": teacher | {"torch_dtype": "bfloat16"},
        "separate_meshes": True,
        "teacher_distributed": {"strategy": "fsdp2", "dp_size": 1, "tp_size": 2},
        "kd_ratio": 0.5,
        "kd_loss_fn": {"_target_": "nemo_automodel.components.loss.kd_loss.KDLoss", "temperature": 1.0},
    }
    student = {"strategy": "fsdp2", "dp_size": 2, "tp_size": 1}
    plan = of_nemo(student, **kd)
    assert plan.unsupported == {}
    assert [plan.options[name] for name in ("trainer", "loss", "gpus", "dtype")] == ["automodel-kd", "received-kl", 2, "fp32"]
    assert "the teacher has GPUs of its own" in plan.assumed["gpus"]
    beside = of_nemo(
        {"strategy": "fsdp2"},
        **{name: value for name, value in kd.items() if name not in ("separate_meshes", "teacher_distributed")}
        | {"model": NEMO_OWN | {"torch_dtype": "bf16"}},
    )
    assert beside.unsupported == {}
    assert [beside.options[name] for name in ("trainer", "gpus", "teacher_model")] == [
        "automodel-kd-beside",
        8,
        "meta-llama/Llama-3.2-3B",
    ]
    for other in ({"separate_meshes": False}, {"kd_ratio": 1}, {"teacher_model": teacher | {"torch_dtype": "float32"}}):
        assert "recipe" in of_nemo(student, **kd | other).unsupported


QAT = {"_target_": "nemo_automodel.components.quantization.qat.QATConfig", "quantizer_type": "int8_dynact_int4weight"}


@pytest.mark.parametrize(
    ("more", "unsupported"),
    [
        ({"groupsize": 256}, set()),
        ({}, set()),
        ({"groupsize": 32}, {"qat.enabled"}),
        ({"quantizer_type": "int4_weight_only"}, {"qat.enabled"}),
        ({"padding_allowed": True}, {"qat.qat_config.padding_allowed"}),
    ],
)
def test_nemo_fake_quantizes_by_torchao(more: dict[str, object], unsupported: set[str]) -> None:
    """components/quantization/qat.py: groups of 256 weights unless the file says otherwise."""
    qat = {"enabled": True, "fake_quant_after_n_steps": 1, "qat_config": QAT | more}
    plan = of_nemo({"strategy": "fsdp2"}, model=NEMO_OWN, qat=qat)
    assert plan.unsupported.keys() == unsupported
    assert plan.options.get("kernels") == (None if "qat.enabled" in unsupported else "torchao")
    assert of_nemo({"strategy": "fsdp2"}, model=NEMO_OWN, qat={"enabled": False}).unsupported == {}
    adapted = of_nemo({"strategy": "fsdp2"}, model=NEMO_OWN, qat=qat, peft={**NEMO_LORA, "dim": 8})
    assert "qat.enabled" in adapted.unsupported  # recipes/llm/train_ft.py:220 raises


def test_what_of_nemo_leaves_the_peak_as_it_is() -> None:
    """NEFTune's hook (components/training/neftune.py); text that FSDP2 does not generate (recipes/llm/train_ft.py:1401)."""
    evaluated = {
        "_target_": "nemo_automodel.components.eval.tool_call_evaluator.ToolCallAccuracyEvaluator",
        "max_new_tokens": 256,
    }
    plan = of_nemo({"strategy": "fsdp2"}, neftune={"noise_alpha": 5.0}, tool_call_eval=evaluated)
    assert plan.unsupported == {}
    written = of_nemo({"strategy": "fsdp2"}, tool_call_eval=evaluated | {"run_on_fsdp2": True})
    assert written.unsupported.keys() == {"tool_call_eval.run_on_fsdp2"}
    assert "tool_call_eval._target_" in of_nemo({"strategy": "ddp"}, tool_call_eval=evaluated).unsupported


def test_nemo_stores_what_does_not_train_as_it_computes() -> None:
    """Release 0.7.0, components/models/common/utils.py (`prepare_frozen_parameters_for_sharding`): bf16, beside LoRA in fp32."""
    wide = NEMO_MODEL | {"torch_dtype": "float32"}
    lora = of_nemo({"strategy": "fsdp2"}, model=wide, peft={**NEMO_LORA, "dim": 8})
    assert (lora.options["dtype"], lora.options["adapter_dtype"]) == ("bf16", "fp32")
    assert of_nemo({"strategy": "fsdp2"}, model=wide).options["dtype"] == "fp32"


def test_experts_of_a_token_share_the_rank() -> None:
    """components/_peft/lora.py (`moe_rank_scaling`): Qwen 3 has 8 experts a token."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "Qwen/Qwen3-30B-A3B"}
    lora = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "target_modules": ["*"], "dim": 64}
    plans = [
        of_nemo({"strategy": "fsdp2", "ep_size": 8}, model=model, peft=lora | {"moe_rank_scaling": on}) for on in (True, False)
    ]
    assert [plan.options.get("rank_pattern") for plan in plans] == [dict.fromkeys(EXPERTS, 8), None]
    assert all(plan.options["target_parameters"] == EXPERTS for plan in plans)


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize(
    ("model", "rank", "trainable"),
    [
        ("zai-org/GLM-4.7-Flash", 8, 269_088_768),
        ("zai-org/GLM-4.7", 4, 1_051_312_128),
        ("zai-org/GLM-5", 4, 1_743_726_592),
        ("deepseek-ai/DeepSeek-V3.2", 4, 1_520_762_880),
        ("MiniMaxAI/MiniMax-M2.5", 4, 741_945_344),
    ],
)
def test_a_star_names_linear_layers_and_experts(model: str, rank: int, trainable: int) -> None:
    """components/_peft/lora.py (`apply_lora_to_linear_modules`), as release 0.7.0 counted them of its own modules on the meta
    device: `*` matches every name, and what is neither linear nor experts is passed by."""
    lora = NEMO_LORA | {"target_modules": ["*"], "dim": 32, "moe_rank_scaling": True}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8}, model=NEMO_MODEL | {"pretrained_model_name_or_path": model}, peft=lora)
    assert plan.options["rank_pattern"] == dict.fromkeys(EXPERTS, rank)
    options: dict[str, Any] = {name: plan.options[name] for name in OF_LORA}
    assert peftplan.estimate(model, **options).trainable_parameters == trainable


@pytest.mark.parametrize("model", ["openai/gpt-oss-20b", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"])
def test_a_star_names_experts_of_other_mixtures_too(model: str) -> None:
    """components/_peft/lora.py:641: these adapters were not counted."""
    lora = NEMO_LORA | {"target_modules": ["*"]}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8}, model=NEMO_MODEL | {"pretrained_model_name_or_path": model}, peft=lora)
    assert plan.unsupported["peft.target_modules"].effect == "unknown"


@pytest.mark.parametrize(
    ("model", "trainable"),
    [
        ("zai-org/GLM-4.7-Flash", 29_937_361_664),
        ("zai-org/GLM-4.7", 352_724_905_984),
        ("zai-org/GLM-5", 743_793_234_432),
        ("deepseek-ai/DeepSeek-V3.2", 671_771_498_752),
        ("MiniMaxAI/MiniMax-M2.5", 228_640_990_208),
        ("moonshotai/Moonlight-16B-A3B", 15_956_700_672),
        ("moonshotai/Kimi-K2-Base", 1_026_243_058_688),
        ("Qwen/Qwen3-30B-A3B", 30_519_539_712),
    ],
)
def test_balanced_routing_has_no_weights(model: str, trainable: int) -> None:
    """components/moe/layers.py:760, as release 0.7.0 counted its own modules on the meta device."""
    backend = {"_target_": "nemo_automodel.components.models.common.BackendConfig", "fake_balanced_gate": True}
    plan = of_nemo(
        {"strategy": "fsdp2", "ep_size": 8}, model=NEMO_MODEL | {"pretrained_model_name_or_path": model, "backend": backend}
    )
    kernels = named_kernels(plan.options["kernels"])
    assert "balanced.gate" in kernels
    assert plan.unsupported["model.backend.fake_balanced_gate"].effect == "lowers"
    estimate = peftplan.estimate(model, method="full", trainer="automodel", kernels=kernels)
    assert estimate.trainable_parameters == trainable


NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
COMPILED_ATTENTION = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "rope_fusion": False, "compile_attn": True}
COMPILED_ATTENTION |= {"experts": "te", "dispatcher": "hybridep"}
OF_DEEPSEEK = COMPILED_ATTENTION | {"model": "deepseek-ai/DeepSeek-V3"}


@pytest.mark.parametrize(
    ("changes", "kernels", "unknown"),
    [
        ({}, "te-norm,deepep,te-linear,balanced", set()),
        ({"again": True}, "te-norm,deepep-again,te-linear,balanced", set()),
        ({"dispatcher": "hybridep", "dispatcher_num_sms": 64}, "te-norm,hybridep,te-linear,balanced", set()),
        ({"dispatcher_num_sms": 64}, None, {"model.backend.dispatcher_num_sms"}),
        ({"dispatcher": "hybridep", "experts": "te"}, "te-norm,hybridep,te-linear,te-experts,balanced", set()),
        (
            {"dispatcher": "hybridep", "experts": "te", "te_fp8": {"recipe": "mxfp8"}},
            "te-norm,hybridep,te-linear,te-mxfp8,balanced",
            set(),
        ),
        (COMPILED_ATTENTION, "torch-norm,torch-compile-attn,hybridep,te-experts,balanced", set()),
        (COMPILED_ATTENTION | {"rope_fusion": True}, None, {"model.backend.compile_attn"}),
        (COMPILED_ATTENTION | {"experts": "torch_mm"}, None, {"model.backend.compile_attn"}),
        (OF_DEEPSEEK, "torch-norm,torch-compile-attn,hybridep,te-experts,balanced", set()),
        (OF_DEEPSEEK | {"experts": "torch_mm"}, "torch-norm,torch-compile-attn,hybridep,balanced", set()),
        (OF_DEEPSEEK | {"te_fp8": {"recipe": "mxfp8"}}, "torch-norm,torch-compile-attn,hybridep,te-mxfp8,balanced", set()),
        ({"model": NANO}, "te-norm,mamba-ssm,deepep,te-linear,balanced", set()),
        ({"model": NANO, "dispatcher": "hybridep"}, "te-norm,mamba-ssm,hybridep,te-linear,balanced", set()),
        ({"model": NANO, "rms_norm": "torch_fp32"}, None, {"model.backend.linear"}),
        (
            {"experts": "te", "te_fp8": {"recipe": "block"}, "whole": True},
            "te-norm,deepep,te-linear,te-fp8-blocks,balanced",
            set(),
        ),
        ({"experts": "te", "te_fp8": {"recipe": "block"}}, None, {"model.backend.te_fp8.recipe"}),
        (
            {"dispatcher": "hybridep", "experts": "te", "te_fp8": {"_target_": "TEFp8Config"}},
            None,
            {"model.backend.te_fp8._target_"},
        ),
        (
            {"dispatcher": "hybridep", "experts": "te", "te_fp8": {}},
            "te-norm,hybridep,te-linear,te-experts,balanced",
            {"model.backend.te_fp8"},
        ),
        ({"experts": "te", "te_fp8": {"recipe": "current"}, "whole": True}, None, {"model.backend.te_fp8.recipe"}),
        ({"fake_gate_noise": 0.5}, None, {"loss_fn.fp32_upcast", "dataset._target_", "model.backend.fake_balanced_gate"}),
        ({"linear": "quack"}, None, {"model.backend.linear"}),
        ({"linear": "quack", "rms_norm": "quack"}, "quack.rms_norm,deepep,quack-linear,balanced", set()),
    ],
)
def test_what_of_the_benchmarks_mixtures_has_a_formula(changes: dict[str, Any], kernels: str | None, unknown: set[str]) -> None:
    """Tokens take experts in turn, the loss reads logits in bf16, and the data set makes the batches."""
    backend = {"attn": "te", "linear": "te", "rms_norm": "te", "experts": "gmm", "dispatcher": "deepep"}
    backend |= {"fake_balanced_gate": True, "enable_fsdp_optimizations": True}
    again, whole = "again" in changes, "whole" in changes
    plan = of_nemo(
        {"strategy": "fsdp2", "ep_size": 8, "activation_checkpointing": not whole, "moe": {"ignore_router_for_ac": not again}},
        recipe="BenchmarkingRecipeForNextTokenPrediction",
        model={
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {
                "_target_": "transformers.AutoConfig.from_pretrained",
                "pretrained_model_name_or_path": changes.get("model", "Qwen/Qwen3-30B-A3B"),
                "trust_remote_code": "model" in changes,
            },
            "backend": backend | {name: value for name, value in changes.items() if name not in ("again", "model", "whole")},
        },
        loss_fn={"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy", "fp32_upcast": False},
        dataset={"_target_": MOCK, "seq_len": 4096},
        dataloader=UNBATCHED,
    )
    assert unknown <= set(plan.unsupported)
    assert bool(unknown) is bool(plan.unsupported)
    if kernels is not None:
        assert named_kernels(plan.options["kernels"]) == named_kernels(kernels)
        assert plan.options["loss"] == "full-no-upcast"


@pytest.mark.parametrize("upcasts", [True, False])
def test_a_loss_of_narrow_logits_is_not_that_of_wide_ones(upcasts: bool) -> None:
    """components/loss/masked_ce.py (`fp32_upcast`): without it there is no copy of the logits in fp32."""
    loss = {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy", "fp32_upcast": upcasts}
    plan = of_nemo({"strategy": "fsdp2"}, loss_fn=loss)
    assert [row.effect for row in plan.unsupported.values()] == ([] if upcasts else ["lowers"])


def test_nemo_frees_the_layers_of_nemotron_s_benchmark() -> None:
    """LoRA of linear layers that are not excluded leaves the experts alone, whose rank another key divides."""
    backend = {"attn": "te", "linear": "te", "rms_norm": "te", "experts": "torch_mm", "dispatcher": "hybridep"}
    repository = {"_target_": "transformers.AutoConfig.from_pretrained", "pretrained_model_name_or_path": NANO}
    plan = of_nemo(
        {"strategy": "fsdp2", "ep_size": 8, "moe": {"reshard_after_forward": True, "ignore_router_for_ac": False}},
        recipe="BenchmarkingRecipeForNextTokenPrediction",
        model={
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": repository,
            "backend": backend | {"fake_balanced_gate": True},
        },
        peft={
            "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
            "exclude_modules": ["*.out_proj"],
            "moe_rank_scaling": True,
        },
        loss_fn={"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy", "fp32_upcast": False},
        dataset={"_target_": MOCK, "seq_len": 4096},
        dataloader=UNBATCHED,
    )
    assert plan.unsupported == {}
    assert plan.options["reshard_after_forward"] is True
    assert "target_parameters" not in plan.options


def test_how_experts_are_gathered_and_recomputed() -> None:
    """components/distributed/config.py:197: defaults are what was rehearsed."""
    keys = {"reshard_after_forward": True, "ignore_router_for_ac": False}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8, "moe": keys})
    assert [key for key in plan.unsupported if ".moe." in key] == [f"distributed.moe.{key}" for key in keys]
    defaults = of_nemo({"strategy": "fsdp2", "ep_size": 8, "moe": {key: not value for key, value in keys.items()}})
    assert not any(".moe." in key for key in defaults.unsupported)


@pytest.mark.parametrize(("model", "read"), [("zai-org/GLM-4.7", True), ("MiniMaxAI/MiniMax-M2.5", False)])
def test_experts_that_are_freed_after_forward(model: str, read: bool) -> None:
    stages = {"strategy": "fsdp2", "ep_size": 8, "pp_size": 2, "moe": {"reshard_after_forward": True}}
    plan = of_nemo(stages, model=NEMO_MODEL | {"pretrained_model_name_or_path": model, "backend": {"dispatcher": "hybridep"}})
    assert plan.options.get("reshard_after_forward") is (True if read else None)
    assert ("distributed.moe.reshard_after_forward" in plan.unsupported) is not read


OF_LORA = ("method", "r", "target_modules", "target_parameters", "rank_pattern")


@pytest.mark.parametrize(
    ("recipe", "refused"),
    [("TrainFinetuneRecipeForNextTokenPrediction", True), ("BenchmarkingRecipeForNextTokenPrediction", False)],
)
def test_only_the_benchmark_sets_how_many_rows_its_data_make(recipe: str, refused: bool) -> None:
    """recipes/llm/benchmark.py (`cfg.dataset.batch_size = local_batch_size`): batches of all rows, which stages divide."""
    dataset = {"_target_": MOCK, "seq_len": 4096}
    plan = of_nemo({"strategy": "fsdp2", "pp_size": 4}, recipe=recipe, dataset=dataset, dataloader=UNBATCHED)
    assert ("raises ValueError" in plan.unsupported["dataset._target_"].why) is refused


@pytest.mark.parametrize(
    ("stages", "model", "loss"), [(2, "deepseek-ai/DeepSeek-V3", "full"), (1, "deepseek-ai/DeepSeek-V3", "cut-apart")]
)
def test_stages_without_hidden_states_have_all_logits(stages: int, model: str, loss: str) -> None:
    fused = {"_target_": "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy"}
    sharded = {"strategy": "fsdp2", "ep_size": 4, "pp_size": stages}
    plan = of_nemo(sharded, model=NEMO_MODEL | {"pretrained_model_name_or_path": model}, loss_fn=fused)
    assert plan.options["loss"] == loss


@pytest.mark.parametrize(("linear", "kernels"), [("te", "hybridep,te-linear"), ("torch", "hybridep"), (None, None)])
def test_which_kernels_of_glm_5_have_a_formula(linear: str | None, kernels: str | None) -> None:
    backend = {"attn": "sdpa", "rms_norm": "torch_fp32", "dispatcher": "hybridep", "experts": "gmm"}
    backend |= {} if linear is None else {"linear": linear}
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "zai-org/GLM-5.1", "backend": backend}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 4}, model=model)
    assert plan.options.get("kernels") == kernels
    assert ("model.backend.dispatcher" in plan.unsupported) is (kernels is None)


@pytest.mark.parametrize(
    ("rows", "model", "known"), [(8, "Qwen/Qwen2.5-32B", True), (4, "Qwen/Qwen2.5-32B", False), (8, "Qwen/Qwen3-8B", False)]
)
def test_a_batch_that_stages_divide_is_made_whole(rows: int, model: str, *, known: bool) -> None:
    """`dataset.batch_size` of what a rank reads, which the rehearsed recipe runs with (tests/rehearse/pipeline.jsonl)."""
    dataset = {"_target_": MOCK, "seq_len": 512}
    stages = {
        "strategy": "fsdp2",
        "pp_size": 4,
        "activation_checkpointing": True,
        "pipeline": IN_STAGES | {"layers_per_stage": 1},
    }
    peft = {**NEMO_LORA, "dim": 16, "target_modules": "*_proj"}
    scheduler = {"local_batch_size": rows, "global_batch_size": 4 * rows}
    plan = of_nemo(
        stages,
        model=NEMO_MODEL | {"pretrained_model_name_or_path": model, "force_hf": True},
        peft=peft,
        step_scheduler=scheduler,
        dataset=dataset,
        dataloader=UNBATCHED,
    )
    assert ("dataset._target_" in plan.refused) is (rows == 8)
    assert ("dataset._target_" not in plan.unsupported) is known
    assert not known or plan.refused["dataset._target_"].instead == {"dataset.batch_size": 8}


MOCK = "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset"
UNBATCHED = {"_target_": "torch.utils.data.DataLoader", "batch_size": None}


MINIMAX = {"attn": "te", "linear": "te", "rms_norm": "torch_fp32", "dispatcher": "hybridep", "experts": "gmm"}
IN_STAGES = {"pp_schedule": "interleaved1f1b", "pp_microbatch_size": 1, "layers_per_stage": 2}
AS_THEY_ARE = {"patch_inner_model": False, "patch_causal_lm_model": False}


@pytest.mark.parametrize(
    ("ep_size", "batches", "fast", "expected", "known"),
    [
        (8, 2, False, (False, True), True),
        (8, 1, False, (False, None), False),
        (8, 2, True, (False, None), False),
        (1, 2, False, (None, None), False),
    ],
)
def test_a_model_that_is_no_unit_reduces_each_micro_batch(
    ep_size: int, batches: int, fast: bool, expected: tuple[object, object], known: bool
) -> None:
    """`moe` counts beside an `ep_size` of 2 or more alone; a model that is no unit was rehearsed with several micro batches, each
    of which reduces."""
    backend = {"attn": "te", "linear": "te", "experts": "gmm", "dispatcher": "deepep", "enable_fsdp_optimizations": fast}
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "zai-org/GLM-4.7-Flash", "backend": backend}
    sharded = {"strategy": "fsdp2", "ep_size": ep_size, "activation_checkpointing": True, "moe": {"wrap_outer_model": False}}
    rows = {"local_batch_size": 4, "global_batch_size": 8 * 4 * batches}
    plan = of_nemo(sharded, model=model, step_scheduler=rows)
    assert (plan.options.get("pp_stage_is_unit"), plan.options.get("sync_each_batch")) == expected
    assert "has no" not in plan.read["distributed.moe.wrap_outer_model"].why
    result = peftplan.estimate(config=plan)
    assert (result.peaks is not None and result.bound is None) is known


@pytest.mark.parametrize(
    ("moe", "fast", "pipeline", "expected", "unsupported"),
    [
        ({"wrap_outer_model": False}, True, AS_THEY_ARE, (False, None), set()),
        ({"wrap_outer_model": False}, False, AS_THEY_ARE, (False, True), set()),
        ({}, True, AS_THEY_ARE, (None, None), set()),
        ({"wrap_outer_model": False}, True, {}, (False, None), {f"distributed.pipeline.{name}" for name in AS_THEY_ARE}),
        ({}, True, AS_THEY_ARE | {"patch_inner_model": True}, (None, None), {"distributed.pipeline.patch_inner_model"}),
    ],
)
def test_which_stages_of_nemo_are_units(
    moe: dict[str, bool], fast: bool, pipeline: dict[str, bool], expected: tuple[object, object], unsupported: set[str]
) -> None:
    """Of MiniMax-M2.1 as the tool's example has it: `enable_fsdp_optimizations` reduces gradients before the step alone."""
    backend = MINIMAX | {"enable_fsdp_optimizations": fast}
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "MiniMaxAI/MiniMax-M2.1", "backend": backend}
    sharded = {"strategy": "fsdp2", "ep_size": 4, "pp_size": 2, "moe": moe, "pipeline": IN_STAGES | pipeline}
    plan = of_nemo(sharded, model=model, step_scheduler={"local_batch_size": 4, "global_batch_size": 64})
    assert (plan.options.get("pp_stage_is_unit"), plan.options.get("sync_each_batch")) == expected
    assert set(plan.unsupported) == unsupported


BY_DEEPEP = {
    "_target_": "nemo_automodel.components.models.common.BackendConfig",
    "attn": "te",
    "linear": "te",
    "dispatcher": "deepep",
}


@pytest.mark.parametrize(("stages", "owners", "nodes"), [(4, 8, 4), (2, 4, None), (2, 8, 2), (4, 32, 16)])
def test_a_stage_has_the_ranks_that_own_its_experts(stages: int, owners: int, nodes: int | None) -> None:
    """8 GPUs of a node are assumed, an equal part of them for each stage; more own experts only on more nodes."""
    plan = of_nemo({"strategy": "fsdp2", "pp_size": stages, "ep_size": owners}, step_scheduler={"global_batch_size": 512})
    assert plan.options.get("nodes") == nodes


@pytest.mark.parametrize(
    ("name", "linear", "kernels"),
    [
        ("Qwen/Qwen3-VL-235B-A22B-Instruct", "te", "hybridep,te-linear"),
        ("Qwen/Qwen3.5-397B-A17B", "torch", "hybridep"),
    ],
)
def test_stages_of_vision_language_mixtures_have_a_formula(name: str, linear: str, kernels: str) -> None:
    turns = {
        "pp_schedule": "interleaved1f1b",
        "pp_microbatch_size": 1,
        "patch_inner_model": False,
        "patch_causal_lm_model": False,
    }
    distributed = {"strategy": "fsdp2", "dp_size": "none", "pp_size": 4, "ep_size": 32, "pipeline": turns}
    backend = BY_DEEPEP | {"attn": "sdpa", "linear": linear, "dispatcher": "hybridep"}
    loss = {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"}
    model = {"pretrained_model_name_or_path": name, "backend": backend}
    plan = of_nemo(distributed, model=model, recipe="FinetuneRecipeForVLM", loss_fn=loss)
    assert plan.unsupported == {}
    assert plan.options["kernels"] == kernels
    whole = of_nemo(distributed | {"pp_size": 1}, model=model, recipe="FinetuneRecipeForVLM", loss_fn=loss)
    assert "model.backend.dispatcher" in whole.unsupported


@pytest.mark.parametrize(
    ("name", "model", "distributed", "more", "known"),
    [
        ("google/gemma-4-E2B-it", {"use_liger_kernel": True, "text_config": {"use_cache": True}}, {}, {}, True),
        ("google/gemma-4-31B-it", {"text_config": {"use_cache": False}}, {"activation_checkpointing": True}, {}, True),
        ("google/gemma-4-31B-it", {}, {"tp_size": 4}, {}, True),
        ("google/gemma-4-31B-it", {}, {"tp_size": 8}, {}, False),
        ("google/gemma-4-31B-it", {}, {"cp_size": 2}, {}, False),
        ("google/gemma-4-31B-it", {}, {}, {"packed_sequence": {"pretokenize": True, "pack_size": 2048}}, False),
        ("google/gemma-4-31B-it", {"attn_implementation": "te"}, {}, {}, False),
        ("google/gemma-4-26B-A4B-it", {"backend": BY_DEEPEP}, {"ep_size": 8}, {}, True),
        ("google/gemma-4-26B-A4B-it", {"backend": BY_DEEPEP}, {"ep_size": 8, "cp_size": 2}, {}, False),
        ("google/gemma-4-26B-A4B-it", {}, {}, {}, False),
        ("google/gemma-4-12B", {"use_liger_kernel": True}, {}, {}, True),
        ("google/gemma-4-12B", {"attn_implementation": "sdpa"}, {}, {}, False),
        ("Qwen/Qwen3-VL-8B-Instruct", {"attn_implementation": "sdpa"}, {}, {}, True),
        ("Qwen/Qwen3-VL-8B-Instruct", {"attn_implementation": "flash_attention_2"}, {}, {}, False),
    ],
)
def test_which_vision_language_models_of_nemo_have_a_formula(
    name: str, model: dict[str, object], distributed: dict[str, object], more: dict[str, object], known: bool
) -> None:
    """Liger's kernels replace no modules of classes of the tool's own (_transformers/auto_model.py:593)."""
    settings = {"pretrained_model_name_or_path": name, "torch_dtype": "bfloat16", "attn_implementation": "eager"}
    plan = of_nemo({"strategy": "fsdp2"} | distributed, model=settings | model, recipe="FinetuneRecipeForVLM", **more)
    assert ("model" not in plan.unsupported) is known
    assert plan.unsupported == {} or not known
    assert plan.options.get("kernels", "none") in ("none", "deepep")


@pytest.mark.parametrize(("weight", "known"), [(0.00001, True), (0.0, False)])
def test_the_weight_of_the_balancing_loss_of_gpt_oss(weight: float, known: bool) -> None:
    """components/models/gpt_oss/model.py:127: without a weight there is no loss that balances the experts."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "openai/gpt-oss-20b", "router_aux_loss_coef": weight}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8}, model=model)
    assert ("model.router_aux_loss_coef" not in plan.unsupported) is known


def test_nemo_trains_the_classifier_beside_an_adapter() -> None:
    """`*classifier` is unfrozen (recipes/llm/train_seq_cls.py:118): a layer of 1,024 × 1,024, a head of 2 × 1,024, and biases.
    LoRA of rank 8 is on queries and values of 24 layers."""
    model = {"pretrained_model_name_or_path": "roberta-large", "num_labels": 2}
    peft = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "target_modules": ["*.query", "*.value"], "dim": 8}
    plan = of_nemo({"strategy": "fsdp2"}, model=model, peft=peft, recipe="TrainFinetuneRecipeForSequenceClassification")
    assert plan.model is not None
    estimate = peftplan.estimate(plan.model, **plan.options)
    assert estimate.trainable_parameters == 24 * 2 * 8 * 2 * 1_024 + 1_024**2 + 1_024 + 2 * 1_024 + 2


@pytest.mark.parametrize(("weight", "known"), [(0.00001, True), (0.0, False)])
def test_the_weight_of_the_balancing_loss_of_qwen(weight: float, known: bool) -> None:
    """components/models/qwen3_moe/model.py:150, of the same gate."""
    model = NEMO_MODEL | {"pretrained_model_name_or_path": "Qwen/Qwen3-30B-A3B-Base", "router_aux_loss_coef": weight}
    plan = of_nemo({"strategy": "fsdp2", "ep_size": 8}, model=model)
    assert ("model.router_aux_loss_coef" not in plan.unsupported) is known
