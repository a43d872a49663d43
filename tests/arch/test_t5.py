"""T5 and mT5 against transformers' own models, a checkpoint that is really loaded, and hand sums."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import transformers

from peftplan.arch.readers import read_config
from peftplan.arch.t5 import TASKS
from peftplan.errors import InputError
from tests.arch.meta import assert_prompt, assert_task

TINY = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 16,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
    "feed_forward_proj": "relu",
}
VARIANTS = {
    "plain": {},
    "gated": {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "num_labels": 5},
    "defaults": {"feed_forward_proj": None, "num_decoder_layers": None, "relative_attention_num_buckets": None},
    "untied": {"tie_word_embeddings": False, "feed_forward_proj": "gated-silu"},
}


def made_up(model_type: str, variant: str = "plain") -> dict:
    fields = {**TINY, **VARIANTS[variant]}
    return {"model_type": model_type, **{key: value for key, value in fields.items() if value is not None}}


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task_type", TASKS)
def test_same_as_transformers(model_type, variant, task_type):
    config = made_up(model_type, variant)
    assert_prompt(assert_task(config, task_type), config)


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_encoder_model(model_type):
    name = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}[model_type]
    arch = assert_task({**made_up(model_type), "architectures": [name]})
    assert arch.model_class == name
    assert [block.stack for block in arch.blocks] == ["encoder"]


def test_hand_sum():
    # shared 20·8 = 160
    # encoder layer: q, k, v, o 4·8·6 + norm 8 + wi, wo 2·8·16 + norm 8 = 464, twice; bias 4·2 in block 0; final norm 8
    # decoder layer: self 192 + 8, cross 192 + 8, MLP 256 + 8 = 664; bias 4·2; final norm 8
    tied = 160 + (2 * 464 + 8 + 8) + (664 + 8 + 8)
    assert read_config(made_up("t5"), name="made up").num_parameters == tied
    untied = {**made_up("t5"), "tie_word_embeddings": False}
    assert read_config(untied, name="made up").num_parameters == tied + 20 * 8


def test_flan_t5_large_as_peft_counts_it():
    # huggingface/peft, examples/int8_training/Finetune_flan_t5_large_bnb_peft.ipynb: "trainable params: 4718592 || all params:
    # 787868672"
    flan = {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 16,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    assert read_config(flan, name="flan-t5-large").num_parameters == 787868672 - 4718592


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
@pytest.mark.parametrize("own_head", [True, False])
def test_loaded_checkpoint(model_type, own_head, tmp_path):
    """`from_pretrained` unties a head that differs from the embedding, although the config class says tied."""
    from safetensors.torch import load_file, save_file

    cls = {"t5": transformers.T5ForConditionalGeneration, "mt5": transformers.MT5ForConditionalGeneration}[model_type]
    config = {**made_up(model_type), "tie_word_embeddings": not own_head}
    cls(cls.config_class(**config)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if own_head:
        weights["lm_head.weight"] = torch.ones(20, 8)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [cls.__name__]}))

    loaded = cls.from_pretrained(tmp_path)
    arch = read_config(config, name="made up")
    assert loaded.config.tie_word_embeddings is True
    assert dict(arch.named_parameters()) == {name: tuple(p.shape) for name, p in loaded.named_parameters()}


def test_saved_anew_by_transformers_5():
    """T5Config writes tie_word_embeddings true, and remembers the false it was given under another name."""
    config = made_up("t5", "untied")
    saved = transformers.T5Config(**config).to_dict()
    assert saved["tie_word_embeddings"] is True
    saved_anew = read_config(saved, name="made up", task_type="SEQ_2_SEQ_LM")
    assert saved_anew.num_parameters == read_config(config, name="made up").num_parameters


def test_blocks():
    encoder, decoder = read_config(made_up("mt5", "defaults"), name="made up").blocks
    assert (encoder.layers, decoder.layers) == ((0, 1), (0, 1))
    assert [(a.causal, a.cross, a.positions) for a in decoder.attentions] == [(True, False, "relative"), (False, True, "none")]
    assert (encoder.mlp.variant, encoder.mlp.activation) == ("gated", "gelu_new")


def test_what_is_refused():
    with pytest.raises(InputError, match="feed_forward_proj"):
        read_config({**made_up("t5"), "feed_forward_proj": "open-gelu"}, name="made up")
    with pytest.raises(InputError, match="d_kv"):
        read_config({key: value for key, value in made_up("t5").items() if key != "d_kv"}, name="made up")
