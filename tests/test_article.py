"""docs/article.md: regenerated and compared, and its numbers against peft, bitsandbytes, safetensors and hand sums."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftplan.job.sources import load, load_config
from peftplan.methods import adapt, configure

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "article.md").read_text(encoding="utf-8")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("article", ROOT / "tools" / "article.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


article = tool()


def row(section: str, start: str) -> list[str]:
    """The cells of the first row of a section that starts with a text."""
    body = next(part for part in re.split(r"^## ", PAGE, flags=re.M) if part.startswith(section))
    line = next(line for line in body.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_what_the_tool_writes() -> None:
    assert article.as_text() == PAGE
    assert article.as_text() == article.as_text()


def test_no_row_of_a_table_is_short_and_every_section_says_what_is_real() -> None:
    first, *sections = re.split(r"^## ", PAGE, flags=re.M)
    assert first.startswith("# ")
    assert len(sections) == 12
    for section in sections:
        assert section.count("**Of the real") == 1, section.splitlines()[0]
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("section", "start", "says", "recomputed"),
    [
        # 12 · 7·10⁹ = 84·10⁹ and 12 · 65·10⁹ = 780·10⁹
        ("Full", "full fine-tuning, 7B", "84 GB", "84.0 GB"),
        ("Full", "full fine-tuning, 65B", "780 GB", "780.0 GB"),
        # 130·10⁹ + 12 · 41.94·10⁶ = 130.503·10⁹;  65·10⁹ · 4.12695 / 8 = 33.531·10⁹
        ("LoRA and QLoRA", "LoRA, 65B", "130.5 GB", "130.5 GB"),
        ("LoRA and QLoRA", "QLoRA, 65B", "33.5 GB", "33.5 GB"),
        # 32 layers · 4 · 16 · 8192 = 16,777,216
        ("LoRA at r = 16", "Llama-2-7B, q k v o", "16,777,216", "16,777,216"),
        # 96 · 2 · 2 · 12288 = 4,718,592 a weight
        ("GPT-3 175B, by targets", "Wq |", "4.7M", "4,718,592 = 4.7M"),
        ("GPT-3 175B, by targets", "Wq + Wv", "9.4M", "9,437,184 = 9.4M"),
        ("GPT-3 175B, by targets", "Wq + Wk", "18.9M", "18,874,368 = 18.9M"),
        # 16 · 8193 = 131,088
        ("Low-rank", "d = 4096", "131,088", "131,088"),
        # 32 · 2 · 2 · 64 · 4096 = 2²⁵
        ("Houlsby", "32 layers", "≈ 33.6M", "33,554,432 = 33.6M"),
        # 32 · 24,576 = 786,432
        ("(IA)³", "32 layers", "786,432", "786,432"),
        # 2 · 32 · 20 · 4096 = 5,242,880
        ("Prefix", "Llama-2-7B", "5,242,880", "5,242,880"),
        # 0.125 + 32 / 16384 = 0.12695
        ("Double", "one scale", "0.5 bits", "0.500 bits"),
        ("Double", "double quantized", "0.127 bits", "0.127 bits"),
    ],
)
def test_where_the_article_is_right(section: str, start: str, says: str, recomputed: str) -> None:
    cells = row(section, start)
    assert (cells[1], cells[-1]) == (says, recomputed)


@pytest.mark.parametrize(
    ("section", "start", "says", "real"),
    [
        # a layer: q k v o 4 · 8192, gate up down 3 · (4096 + 11008); · 32 · 16
        ("LoRA at r = 16", "Llama-2-7B, all linear", "13,631,488", "39,976,960"),
        # q o 2 · 16384, k v 2 · (8192 + 1024); · 80 · 16
        ("LoRA at r = 16", "Llama-2-70B, q k v o", "83,886,080", "65,536,000"),
        ("LoRA at r = 16", "Llama-2-70B, all linear", "", "207,093,760"),
        # 2 · 80 · 20 · 1024 and 2 · 32 · 20 · 1024
        ("Prefix", "Llama-2-70B", "", "3,276,800"),
        ("Prefix", "Llama-3-8B", "", "1,310,720"),
        # 96 · 2 · 2 · 12288 · r
        ("GPT-3 175B, by rank", "r = 1 ", "0.3M", "4,718,592 = 4.7M"),
        ("GPT-3 175B, by rank", "r = 64", "18.9M", "301,989,888 = 302.0M"),
    ],
)
def test_where_the_article_is_off(section: str, start: str, says: str, real: str) -> None:
    cells = row(section, start)
    assert (cells[1], cells[-1]) == (says, real)


def test_what_gives_the_numbers_that_are_not_the_models() -> None:
    # 48 · 2 · 2 · 1536 = 294,912, and 64 times that
    assert row("GPT-3 175B, by rank", "r = 1 ")[2] == "294,912 = 0.3M"
    assert row("GPT-3 175B, by rank", "r = 64")[2] == "18,874,368 = 18.9M"
    # q o 2 · 8192, k v 2 · 5120 = 26,624 a layer; · 32 · 16
    assert "Llama-3-8B (13,631,488) or Mistral-7B (13,631,488)" in PAGE
    assert "LLaMA-65B (83,886,080)" in PAGE  # 80 · 4 · 16 · 16384
    assert "RoBERTa-base at r = 8: 294,912" in PAGE  # 12 · 2 · 8 · 1536
    assert "33,820,672 for Llama-2-7B" in PAGE  # 2²⁵ + 64 · (64 + 4096)
    assert "which gives 614,400" in PAGE  # 32 · (4096 + 4096 + 11008)
    assert "has 524,288" in PAGE  # 32 · (1024 + 1024 + 14336)


def test_bytes_per_parameter_of_full_fine_tuning() -> None:
    # 6,738,415,616 and 65,285,660,672 parameters
    assert row("Full", "all in bf16")[1:] == ["8.00", "53.9 GB", "522.3 GB"]
    assert row("Full", "bf16, `paged")[1:] == ["12.00", "80.9 GB", "783.4 GB"]
    assert row("Full", "fp32 weights")[1:] == ["16.00", "107.8 GB", "1,044.6 GB"]


def test_llama_65b_by_hand() -> None:
    """80 layers of 8192, MLP 22016, vocabulary 32000; 41,943,040 adapter parameters."""
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)  # 64,760,053,760 in NF4
    dense = 2 * 32000 * 8192 + (2 * 80 + 1) * 8192  # embedding, lm_head, norms
    adapter = 41_943_040
    blocks = linear // 64
    scales = 4 * blocks, blocks + 4 * blocks // 256  # plain, double quantized; tables add under 0.01 GB

    def shown(*parts: float) -> list[str]:
        return [f"{part / 10**9:.1f} GB" for part in (*parts, sum(parts))]

    assert row("LoRA and QLoRA", "LoRA, bf16")[1:] == shown(2 * (linear + dense), 0, 16 * adapter)
    assert row("LoRA and QLoRA", "QLoRA, Trainer")[1:] == shown(linear / 2 + 4 * dense, scales[1], 16 * adapter)
    assert row("LoRA and QLoRA", "QLoRA, TRL")[1:] == shown(linear / 2 + 2 * dense, scales[1], 8 * adapter)
    assert row("LoRA and QLoRA", "the second")[1:] == shown(linear / 2 + 4 * dense, scales[0], 16 * adapter)


PEFT_CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("llama-2-7b", "LoraConfig", {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 16_777_216),
    ("llama-2-7b", "LoraConfig", {"r": 16, "target_modules": "all-linear"}, 39_976_960),
    ("llama-2-70b", "LoraConfig", {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 65_536_000),
    ("llama-2-70b", "LoraConfig", {"r": 16, "target_modules": "all-linear"}, 207_093_760),
    ("llama-65b", "LoraConfig", {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 83_886_080),
    ("mistral-7b-v0.1", "LoraConfig", {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 13_631_488),
    ("llama-2-7b", "IA3Config", {}, 614_400),
    ("llama-3-8b", "IA3Config", {}, 524_288),
    ("llama-2-7b", "PrefixTuningConfig", {"num_virtual_tokens": 20}, 5_242_880),
    ("llama-2-70b", "PrefixTuningConfig", {"num_virtual_tokens": 20}, 3_276_800),
    ("gpt-3", "LoraConfig", {"r": 2, "target_modules": ["q_proj"]}, 4_718_592),
    ("gpt-3", "LoraConfig", {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}, 18_874_368),
    ("gpt-3", "LoraConfig", {"r": 1, "target_modules": ["q_proj", "v_proj"]}, 4_718_592),
    ("smaller", "LoraConfig", {"r": 1, "target_modules": ["q_proj", "v_proj"]}, 294_912),
    ("wide", "IA3Config", {}, 786_432),
]
"""Numbers of the page: the model, peft's own config, and what peft counts on the meta device."""

OWN_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-3": article.GPT3,
    "smaller": article.SMALLER,
    "wide": {**article.LLAMA_7B, "intermediate_size": 16384},
}


@pytest.mark.parametrize(("name", "config_class", "options", "count"), PEFT_CASES)
def test_peft_counts_the_same(name: str, config_class: str, options: dict[str, Any], count: int) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    raw = OWN_CONFIGS.get(name) or load_config(name)
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        adapted = peft.get_peft_model(model, getattr(peft, config_class)(task_type="CAUSAL_LM", **options))
    assert adapted.get_nb_trainable_parameters()[0] == count
    assert f"{count:,}" in PAGE
    if name in OWN_CONFIGS:
        base = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" not in n and "ia3_" not in n)
        assert load(raw).num_parameters == base


def test_nf4_levels_are_those_of_bitsandbytes() -> None:
    pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    constants = functional.get_4bit_type("nf4", device="cpu").tolist()
    levels = [level for _, level in article.nf4_levels()]
    assert levels == pytest.approx(constants, abs=1e-6)
    assert [f"{level:.5f}" for level in constants] == [row("NF4", f"{i} |")[2] for i in range(16)]


def test_nf4_levels_are_those_of_the_map_that_bitsandbytes_derives_them_from() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    pytest.importorskip("scipy")
    derived = sorted(set(functional.create_normal_map().tolist()))  # a 256-element tensor, padded with zeros
    assert [level for _, level in article.nf4_levels()] == pytest.approx(derived, abs=1e-6)


def test_nf4_probabilities_are_normal() -> None:
    """The distribution function undoes the quantile: Φ(x) = ½·(1 + erf(x / √2)); the outermost level is 1.8481 deviations."""
    (low, first), *_, (high, last) = article.nf4_levels()
    assert (first, last) == (-1.0, 1.0)
    assert low + high == pytest.approx(1)
    for p, level in article.nf4_levels():
        assert (1 + math.erf(level * 1.848131420707975 / math.sqrt(2))) / 2 == pytest.approx(p, abs=1e-9)


def test_equation_4_is_symmetric_and_not_nf4() -> None:
    levels = article.equation_4()
    assert levels == pytest.approx([-level for level in reversed(levels)])
    # Q(2/17) = -1.18683, Q(3/17) = -0.92890, Q(1/17) = -1.56472: (1.18683 + 0.92890) / (1.56472 + 1.18683) = 0.76892
    assert levels[1] == pytest.approx(-0.76892, abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapter_file_is_what_peft_saves(dtype: str, tmp_path: Path) -> None:
    """Twelve layers, so that names sort as text: layers.10 comes before layers.2."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    raw = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    adapted.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(tmp_path)
    method, config = configure("lora", {"r": 3, "target_modules": "all-linear"})
    added = adapt(load(raw), method, config).added
    assert article.file_bytes(added, dtype=dtype) == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_adapter_files_by_the_bytes_of_their_tensors() -> None:
    # 4 · 16,777,216 and 2 · 39,976,960 bytes of tensors; names, shapes and offsets take 120 to 180 bytes a tensor
    fp32 = int(row("Adapter", "Llama-2-7B, r = 16, q k v o")[1].split(" ")[0].replace(",", ""))
    bf16 = int(row("Adapter", "Llama-2-7B, r = 16, all")[2].split(" ")[0].replace(",", ""))
    assert 120 * 256 < fp32 - 67_108_864 < 180 * 256  # 32 · 4 · 2 tensors
    assert 120 * 448 < bf16 - 79_953_920 < 180 * 448  # 32 · 7 · 2 tensors
    assert 50 < fp32 / 10**6 < bf16 / 10**6 < 100
