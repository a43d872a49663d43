"""Stand-ins for repositories that are not there, as the real libraries read them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from peftplan.rehearse.inside import holes, standins, texts  # noqa: E402

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}

TINY_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 320,
    "feed_forward_proj": "gated-gelu",
    "dtype": "bfloat16",
}


def test_the_real_loader_reads_a_checkpoint_of_holes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    nbytes = standins.write_checkpoint(tmp_path)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert str(model.dtype) == "torch.bfloat16"
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < nbytes


def test_a_release_that_looks_for_its_files_elsewhere_is_left_as_it_is() -> None:
    """`modeling_utils` of transformers 4.47 has no `_get_resolved_checkpoint_files`."""
    module = SimpleNamespace()
    standins._watch_loader(module, print)
    assert not vars(module)


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        ("gptq", {"g_idx": [96], "qweight": [12, 64], "qzeros": [3, 8], "scales": [3, 64]}),
        ("awq", {"qweight": [96, 8], "qzeros": [3, 8], "scales": [3, 64]}),
    ],
)
def test_linear_layers_are_packed_as_the_config_says(method: str, shapes: dict[str, list[int]], tmp_path: Path) -> None:
    """96 inputs of 4 bits are 12 words of 32 bits and 3 groups of 32; 64 outputs are 8 words."""
    stored = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **stored}), encoding="utf-8")
    standins.write_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    down = "model.layers.1.mlp.down_proj."
    assert {name.removeprefix(down): row["shape"] for name, row in header.items() if name.startswith(down)} == shapes
    assert header["model.norm.weight"]["dtype"] == "BF16"
    assert header[f"{down}scales"]["dtype"] == "F16"


@pytest.mark.parametrize("stated", [True, False])
def test_a_head_of_its_own_follows_the_config(stated: bool, tmp_path: Path) -> None:
    """The config class of T5 forces ties on; what a checkpoint ships beside its embedding stays untied if it differs."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY_T5, "tie_word_embeddings": stated}), encoding="utf-8")
    nbytes = standins.write_checkpoint(tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.shared.weight) is stated
    assert nbytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_tokenizer_has_the_models_tokens(tmp_path: Path) -> None:
    for name, content in texts.tokenizer_files(TINY):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == TINY["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer("word " * 8)["input_ids"]) == 10
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_holes_are_files_that_safetensors_opens(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    holes.write(tmp_path / "x.safetensors", [("a", torch.bfloat16, (3, 5)), ("b", torch.int64, ())], {"format": "pt"})
    tensors = load_file(tmp_path / "x.safetensors")
    assert (tensors["a"].shape, tensors["b"].dtype, int(tensors["b"])) == ((3, 5), torch.int64, 0)


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b-instruct", "gemma-3-4b-it"])
def test_a_processor_prepares_pictures_for_a_model_that_sees(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    from peftplan.job.sources import load_config

    config = load_config(name)
    for file, content in (("config.json", config), *texts.tokenizer_files(config), *texts.processor_files(config)):
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    batch = processor(text=[text], images=[image.new("RGB", (448, 448))], return_tensors="pt")
    pictures = batch["input_ids"] == config.get("image_token_id", config.get("image_token_index"))
    assert isinstance(batch["pixel_values"], torch.Tensor)
    assert int(pictures.sum()) == 256


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "gemma-3-270m", "gpt2", "bert-base-uncased"])
def test_every_class_of_tokenizer_makes_tokens(name: str, tmp_path: Path) -> None:
    from peftplan.job.sources import load_config

    config = load_config(name)
    for file, content in (("config.json", config), *texts.tokenizer_files(config)):
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert 100 <= len(tokenizer("word " * 80)["input_ids"]) <= 402
