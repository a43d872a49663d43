"""LoRA, its relatives and peft's matching rules against peft on the meta device, and published counts of fused experts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("peft")

import peft
import peft.optimizers
import torch

from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.job.sources import load
from peftplan.methods import adapt, configure
from peftplan.methods.adaptation import NeedsPeftError
from peftplan.methods.experts import CONVERSIONS
from tests.methods import tiny, witness
from tests.methods.tiny import assert_like_peft, ours, total


def test_hand_sum() -> None:
    adaptation = ours("llama", "lora", r=4, target_modules=["q_proj", "v_proj"])
    # per layer: q 4·(48 + 48) = 384, v 4·(48 + 16) = 256; three layers
    assert adaptation.num_trainable == 3 * (384 + 256) == total(adaptation.added)


def test_dora_adds_one_magnitude_per_output() -> None:
    plain, dora = (ours("llama", name, target_modules=["q_proj", "v_proj"]).num_trainable for name in ("lora", "dora"))
    assert dora - plain == 3 * (48 + 16)


CASES: list[tuple[str, str | None, dict[str, Any]]] = [
    ("llama", None, {"target_modules": "all-linear", "use_dora": True}),
    ("llama", "SEQ_CLS", {"target_modules": "all-linear"}),
    ("llama", None, {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("llama", None, {"target_modules": ["layers.1.self_attn.q_proj", "k_proj"],
                     "rank_pattern": {"layers.[02].self_attn.k_proj": 3, "^model.layers.1.self_attn.k_proj": 5}}),
    ("llama", None, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    ("qwen2", None, {"target_modules": ["q_proj", "embed_tokens"], "bias": "all", "modules_to_save": ["k_proj"]}),
    ("qwen2", None, {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp", "norm"]}),
    ("qwen2", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("qwen2", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("qwen2", None, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ("qwen2", None, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
    ("qwen2", None, {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("qwen2", "TOKEN_CLS", {"target_modules": ["q_proj"]}),
    ("gpt2", None, {"target_modules": ["c_attn"], "layers_to_transform": 1}),
    ("gpt2", None, {"target_modules": ["attn.c_proj", "wte"], "use_dora": True, "bias": "lora_only"}),
    ("bloom", None, {"target_modules": "all-linear", "exclude_modules": ["dense"], "lora_bias": True}),
    ("t5", None, {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["block"]}),
    ("t5", None, {"target_modules": "all-linear", "exclude_modules": r"decoder\..*", "modules_to_save": ["shared"]}),
    ("bert", None, {"target_modules": ["query"], "modules_to_save": ["cls"], "bias": "all"}),
    ("bert", None, {"target_modules": ["query"], "modules_to_save": ["decoder", "word_embeddings"]}),
    ("bert", "QUESTION_ANS", {"target_modules": ["query"]}),
    ("roberta", "SEQ_CLS", {"target_modules": "all-linear", "bias": "all"}),
    ("vit", None, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    ("mixtral", None, {"target_modules": "all-linear"}),
    ("mixtral", None, {"target_modules": "all-linear", "r": 4, "rank_pattern": {"gate_up_proj": 3, "experts.down_proj": 5}}),
    ("mixtral", None, {"target_modules": ["w1", "w2", "w3"], "modules_to_save": ["lm_head"]}),
    ("mixtral", None, {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "down_proj"]}),
    ("qwen2_moe", None, {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}),
    ("qwen3_moe", None, {"target_modules": ["gate_proj", "up_proj"], "r": 5, "rank_pattern": {"q_proj": 2}}),
    ("granitemoe", None, {"target_modules": ["q_proj"], "target_parameters": ["input_linear.weight"]}),
    ("deepseek_v3", None, {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "task", "options"), CASES)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "lora", task, device="cpu" if options.get("init_lora_weights") == "mica" else "meta", **options)


@pytest.mark.parametrize("model", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "granitemoe"])
def test_linear_names_are_those_that_tools_list(model: str) -> None:
    """The last names of all `nn.Linear` but the head (ms-swift, `find_all_linears`). Experts are parameters: where nothing else
    has their names, they are not adapted, and dropout is not refused.
    """
    base = tiny.real(model)
    linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)} - {
        "lm_head"
    }
    adapted = witness.peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=sorted(linear)))
    adaptation = ours(model, "lora", r=4, target_modules="linear-names")
    witness.assert_same(tiny.architecture(model), adaptation, base, adapted)
    if model in ("mixtral", "qwen3_moe"):
        assert (
            ours(model, "lora", r=4, target_modules="linear-names", lora_dropout=0.05).num_trainable == adaptation.num_trainable
        )


NO_DEFAULT = ("distilbert", "vit", "whisper", "mixtral", "granitemoe", "qwen2_moe", "qwen3_moe", "deepseek_v3")
"""Model types for which peft 0.21.2 has, or finds, no default targets of LoRA."""


@pytest.mark.parametrize("model", NO_DEFAULT)
def test_no_default_targets(model: str) -> None:
    with pytest.raises(RefusedError, match=r"no default (LORA )?targets"):
        ours(model, "lora")
    with pytest.raises(ValueError, match="target_modules"):
        tiny.peft_of(model, "lora")


@pytest.mark.parametrize("model", [m for m in tiny.CONFIGS if m not in NO_DEFAULT])
def test_default_targets(model: str) -> None:
    assert_like_peft(model, "lora")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}),
    ],
)
def test_lora_fa_freezes_what_its_optimizer_freezes(model: str, options: dict[str, Any]) -> None:
    base = tiny.real(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = witness.peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
        peft.optimizers.create_lorafa_optimizer(adapted, r=4, lora_alpha=8, lr=1e-4)
    witness.assert_same(tiny.architecture(model), ours(model, "lora-fa", r=4, **options), base, adapted)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # peft's own counts on the meta device; Mixtral by hand, per layer at r 16: q, o 16·8192 each, k, v 16·5120 each,
        # gate 16·(4096 + 8), gate_up 256·(4096 + 28672), down 128·(14336 + 4096): 11,239,552; 32 layers
        ("mistralai/Mixtral-8x7B-v0.1", 32 * 11_239_552),
        ("Qwen/Qwen3-30B-A3B", 996_507_648),
        ("deepseek-ai/DeepSeek-V2-Lite", 358_994_944),
    ],
)
def test_fused_experts_at_full_size(name: str, expected: int) -> None:
    assert adapt(load(name), *configure("lora", {"r": 16})).num_trainable == expected


def test_conversions_are_those_of_the_installed_libraries() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    rules = conversion._MOE_TARGET_MODULE_MAPPING
    assert {k: v for k, v in conversion._MODEL_TO_CONVERSION_PATTERN.items() if v in rules and k in CONVERSIONS} == CONVERSIONS
    known = {k for k, v in conversion._MODEL_TO_CONVERSION_PATTERN.items() if v in rules}
    assert known - CONVERSIONS.keys() == set(), "a model type that peft rewrites is missing here"


@pytest.mark.parametrize(
    ("model", "attention", "mlp"),
    [
        ("gpt2", ("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj")),
        ("bloom", ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
        ("t5", ("q", "k", "v", "o"), ("wi", "wo")),
        (
            "bert",
            ("query", "key", "value", "attention.output.dense"),
            ("intermediate.dense", "bert.encoder.layer.{}.output.dense"),
        ),
    ],
)
def test_words_name_one_part_each(model: str, attention: tuple[str, ...], mlp: tuple[str, ...]) -> None:
    both = [ours(model, "lora", target_modules=word) for word in ("attention", "mlp")]
    assert [dict(adaptation.resolved)["target_modules"] for adaptation in both] == [attention, mlp]
    families = [{m.name for m in adaptation.matched} for adaptation in both]
    assert not families[0] & families[1]
    linear = {m.name for m in tiny.architecture(model).modules if m.kind in ("Linear", "Conv1D") and m.layers is not None}
    assert families[0] | families[1] == linear


REFUSED: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("qwen2", "TOKEN_CLS", {"target_modules": "all-linear"}, "modules_to_save cannot be applied"),
    ("bert", "QUESTION_ANS", {"target_modules": "all-linear"}, "modules_to_save cannot be applied"),
    ("distilbert", "SEQ_CLS", {"target_modules": "all-linear"}, "modules_to_save cannot be applied"),
    ("llama", None, {"target_modules": "all-linear", "layers_to_transform": [1]}, "cannot be used when"),
    ("llama", None, {"target_modules": ["q_proj"], "layers_pattern": ["layers"]}, "must also be specified"),
    ("llama", None, {"target_modules": ["self_attn"]}, "is not supported"),
    ("llama", None, {"target_modules": ["q_proj"], "lora_bias": True, "use_dora": True}, "not supported for DoRA"),
    ("llama", None, {"target_modules": ["q_proj"], "lora_bias": True, "init_lora_weights": "gaussian"}, "only supported with"),
    ("llama", None, {"target_modules": ["embed_tokens"], "lora_bias": True}, "lora_bias"),
    ("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                     "trainable_token_indices": {"embed_tokens": [1]}}, "not both"),
    ("llama", None, {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "cannot be applied to modules of type"),
    ("mixtral", None, {}, "No `target_modules` passed"),
    ("mixtral", None, {"target_modules": ["w1"]}, "without also targeting w3"),
    ("mixtral", None, {"target_modules": "all-linear", "use_dora": True}, "does not work with use_dora"),
    ("mixtral", None, {"target_modules": "all-linear", "lora_dropout": 0.1}, "does not work with lora_dropout"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "task", "options", "reason"), REFUSED)
def test_refused_by_both(model: str, task: str | None, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedError):
        ours(model, "lora", task, **options)
    with pytest.raises((ValueError, TypeError), match=reason):
        tiny.peft_of(model, "lora", task, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q_prj"]}, InputError, "near: q_proj"),
        ({"target_modules": "["}, InputError, "not a regular expression"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, InputError, "near: lm_head"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 2}}, InputError, "not a regular expression"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["attn"]}, NeedsPeftError, "holds the target"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [96]}, InputError, "from 0 to 95"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "piss"}, UnknownNameError, "did you mean pissa"),
    ],
)
def test_one_line_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ours("llama", "lora", **options)


@pytest.mark.parametrize(("model", "head"), [("llama", "lm_head"), ("whisper", "proj_out")])
def test_a_saved_head_beside_trained_tokens_is_left_to_peft(model: str, head: str) -> None:
    """Where the head is tied, peft wraps its copy as tokens too, and the model fails in forward."""
    with pytest.raises(NeedsPeftError, match="beside an embedding in modules_to_save"):
        ours(model, "lora", target_modules=["q_proj"], modules_to_save=[head], trainable_token_indices=[1])


def test_linear_in_rank() -> None:
    counts = [ours("llama", "lora", r=r, target_modules="all-linear").num_trainable for r in (1, 2, 4)]
    assert counts[1] == 2 * counts[0]
    assert counts[2] == 4 * counts[0]
