"""Write docs/article.md: the numbers of the explainer on LoRA and PEFT that peftplan grew out of, recomputed by the library.

Run after a change of a formula: `python tools/article.py`. What the article says is quoted as text; every other number is
computed here, by `estimate` and the library's parts where they have it. The article counts in GB = 10⁹ and MB = 10⁶, and so
does the page. Needs the base install only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any

from peftplan.dtypes import ITEMSIZE
from peftplan.job.sources import load
from peftplan.ledger import Allocation
from peftplan.methods.adaptation import AddedTensor
from peftplan.planning.estimate import estimate
from peftplan.report.markdown import table
from peftplan.results.estimate import Estimate
from peftplan.storage import bnb, parse_quant, stored
from peftplan.units import GB

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "article.md"

MB = 10**6
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OPT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
COLUMNS = ("what", "the article says", "formula", "recomputed")

RULE = ("bf16", "bf16", "fp32", "fp32")
"""The article's rule: a bf16 weight, its bf16 gradient, and Adam's two states in fp32."""

SAFETENSORS_DTYPE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SAFETENSORS_LENGTH = 8
"""Bytes of the header's length, and what the header is padded to (safetensors 0.8, `serialize`)."""

NF4_TAIL = (1 / 30 + 1 / 32) / 2
"""What NF4 leaves outside its outermost level, on each side: the mean of half a step of 15 and of 16 (arXiv 2306.06965);
1 - NF4_TAIL is the `offset=0.9677083` of `create_normal_map` (bitsandbytes/functional.py 0.50.2)."""


def gpt_like(*, hidden_size: int, num_hidden_layers: int, head_dim: int = 128) -> dict[str, Any]:
    """A config of GPT-3's shape: OPT's type, whose q, k, v and output projections are separate and whose MLP is 4·d wide.

    GPT-3 (arXiv 2005.14165, table 2.1) has no Hugging Face model; its 175B model is d = 12288, 96 layers, 96 heads of 128.
    """
    return {
        "model_type": "opt",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // head_dim,
        "ffn_dim": 4 * hidden_size,
        "max_position_embeddings": 2048,
        "vocab_size": 50257,
    }


LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
"""Llama-2-7B's shape but for the width of its MLP, `intermediate_size`."""

GPT3 = gpt_like(hidden_size=12288, num_hidden_layers=96)
SMALLER = gpt_like(hidden_size=1536, num_hidden_layers=48)


def trainable(model: object, **options: Any) -> int:
    """Trainable parameters, as peft would print them."""
    return estimate(model, **options).trainable_parameters


def lora(model: object, *, r: int, targets: Iterable[str] | None = ATTENTION) -> int:
    """Trainable parameters of LoRA; `targets` None is all linear layers."""
    return trainable(model, method="lora", r=r, target_modules=tuple(targets) if targets else None)


def nf4_levels() -> list[tuple[float, float]]:
    """NF4's sixteen levels with the probability that each is the quantile of, in N(0, 1): 8 above zero, 7 below, and zero."""
    quantile, outermost = NormalDist().inv_cdf, 1 - NF4_TAIL

    def half(n: int) -> list[float]:
        return [outermost + (0.5 - outermost) * i / n for i in range(n)]

    probabilities = sorted([*half(8), 0.5, *(1 - p for p in half(7))])
    return [(p, quantile(p) / quantile(outermost)) for p in probabilities]


def equation_4() -> list[float]:
    """The QLoRA paper's eq. 4 for k = 4, ½·(Q(i/17) + Q((i+1)/17)), where it is finite (i = 1 … 15), scaled to [-1, 1]."""
    quantile = NormalDist().inv_cdf
    levels = [(quantile(i / 17) + quantile((i + 1) / 17)) / 2 for i in range(1, 16)]
    return [level / levels[-1] for level in levels]


def file_bytes(added: Iterable[AddedTensor], *, dtype: str) -> int:
    """Bytes of the `adapter_model.safetensors` that `save_pretrained` writes: 8 of length, a padded JSON header, the tensors.

    Source: safetensors 0.8 `serialize` (tensors of one dtype in the order of their names), and peft 0.21.2 `save_and_load.py`
    (names start with `base_model.model.`, the adapter's own name is dropped).
    """
    tensors = sorted((f"base_model.model.{name}", t.shape) for t in added for name in t.names())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + ITEMSIZE[dtype] * prod(shape)
        header[name] = {"dtype": SAFETENSORS_DTYPE[dtype], "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return SAFETENSORS_LENGTH + -(-length // SAFETENSORS_LENGTH) * SAFETENSORS_LENGTH + end


def section(title: str, *parts: str) -> str:
    """A heading, its paragraphs (one line each) and its tables (left as they are)."""
    return "\n\n".join((title, *(part if part.startswith("|") else " ".join(part.split()) for part in parts)))


def millions(count: int) -> str:
    return f"{count / 10**6:.1f}M"


def gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.1f} GB"


def introduction() -> str:
    return section(
        "# The explainer's numbers, recomputed",
        """peftplan grew out of an article that explains LoRA and parameter-efficient fine-tuning with tables of
        numbers. This page recomputes each table: what the article says, the formula behind it, what peftplan
        computes, and what holds for the real model where the article is off. It is off for a few recurring reasons:
        keys and values are narrower than the model (grouped-query attention), an MLP is not four times as wide as the
        model, and a rule of thumb leaves out what a library really stores.""",
        """Units: a count is a number of parameters; GB = 10⁹ bytes and MB = 10⁶ bytes, as in the article (elsewhere peftplan
        shows GiB = 2³⁰). `tools/article.py` writes this page; edit that file, not this one.""",
    )


def rule() -> str:
    per_parameter = sum(ITEMSIZE[dtype] for dtype in RULE)
    rows = [
        (f"full fine-tuning, {n}B", says, f"{per_parameter} · {n}·10⁹", gb(per_parameter * n * GB))
        for n, says in ((7, "84 GB"), (65, "780 GB"))
    ]
    return section(
        "## Full fine-tuning: 2N + 2N + 4N + 4N",
        """A bf16 weight, a bf16 gradient and two fp32 states of Adam: 2 + 2 + 4 + 4 = 12 bytes for each of N parameters.""",
        table(COLUMNS, rows),
        f"""**Of the real models.** "7B" is {load("llama-2-7b").num_parameters:,} parameters (Llama-2-7B) and "65B" is
        {load("llama-65b").num_parameters:,} (LLaMA-65B). How many bytes each takes depends on the recipe, and only one of
        these recipes is the article's. Weights, gradients and optimizer states; activations come on top:""",
        real_full(),
    )


def real_full() -> str:
    recipes = (
        ("all in bf16, `adamw_torch`: torch keeps Adam's states in the weight's dtype", "bf16", "adamw_torch"),
        ("bf16, `paged_adamw_32bit`: the article's rule", "bf16", "paged_adamw_32bit"),
        ("fp32 weights under bf16 autocast, `adamw_torch`", "fp32", "adamw_torch"),
    )
    rows = []
    for text, dtype, optim in recipes:
        small, large = (estimate(m, method="full", dtype=dtype, optim=optim) for m in ("llama-2-7b", "llama-65b"))
        rows.append((text, f"{counted(small) / small.total_parameters:.2f}", gb(counted(small)), gb(counted(large))))
    return table(("recipe", "bytes per parameter", "Llama-2-7B", "LLaMA-65B"), rows)


def counted(result: Estimate) -> int:
    """All that is counted, in the allocator and in managed memory."""
    return result.persistent_bytes + result.managed_bytes


def lora_and_qlora() -> str:
    n, per_parameter = 65 * GB, sum(ITEMSIZE[dtype] for dtype in RULE)
    half, whole = lora("llama-65b", r=8), lora("llama-65b", r=16)
    bits = 4 + absmax_bits(double_quant=True)
    rows = [
        ("LoRA, 65B", "130.5 GB", f"2 · 65·10⁹ + {per_parameter} · {half:,}", gb(2 * n + per_parameter * half)),
        ("QLoRA, 65B", "33.5 GB", f"{bits:.3f} / 8 · 65·10⁹, no adapter counted", gb(bits / 8 * n)),
        ("QLoRA, 65B", "33.5 GB", f"0.5 · 65·10⁹ + {per_parameter} · {whole:,}, no scales", gb(n / 2 + per_parameter * whole)),
    ]
    return section(
        "## LoRA and QLoRA on 65B",
        f"""The frozen base takes 2 bytes per parameter in bf16 (130 GB) and half a byte in NF4 (32.5 GB); only the adapter
        pays the 12 bytes of the rule. These sums give the article's totals. LoRA's 0.5 GB is what an adapter of {half:,}
        takes: LLaMA-65B at r = 8 on q, k, v and o, or r = 16 on q and v. QLoRA's 1.0 GB is either the scales of double
        quantization or an adapter of {whole:,}, r = 16 on all four; both round to the same number.""",
        table(COLUMNS, rows),
        f"""The two rows do not share an adapter: double quantization *and* LoRA's 0.5 GB make
        {gb(bits / 8 * n + per_parameter * half)}.""",
        """**Of the real model.** LLaMA-65B with r = 8 on q, k, v and o. The token embedding and `lm_head` are never stored in
        NF4; peft keeps adapters in fp32; and `prepare_model_for_kbit_training`, which TRL does not call, turns what stayed in
        16 bits into fp32 as well. Activations come on top.""",
        real_65b(),
    )


def real_65b() -> str:
    recipes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("LoRA, bf16 base", {"method": "lora"}),
        ("QLoRA, Trainer with kbit preparation", {"method": "qlora"}),
        ("QLoRA, TRL", {"method": "qlora", "trainer": "trl"}),
        ("the second without double quantization", {"method": "qlora", "double_quant": False}),
    )
    rows = []
    for text, options in recipes:
        result = estimate("llama-65b", r=8, target_modules=ATTENTION, **options)
        c = result.static.by_category()
        adapter = c["adapter_weights"] + c["gradients"] + c["optimizer_states"]
        rows.append((text, gb(c["weights"]), gb(c["quant_state"]), gb(adapter), gb(counted(result))))
    return table(("recipe", "base weights", "quantization state", "adapter, its gradients, Adam", "sum"), rows)


def lora_counts() -> str:
    small, large = "llama-2-7b", "llama-2-70b"
    rows = [
        ("Llama-2-7B, q k v o", "16,777,216", "32 · 16 · 4 · (4096 + 4096)", f"{lora(small, r=16):,}"),
        ("Llama-2-7B, all linear", "13,631,488", "32 · 16 · (4 · 8192 + 3 · 15104)", f"{lora(small, r=16, targets=None):,}"),
        ("Llama-2-70B, q k v o", "83,886,080", "80 · 16 · (2 · 16384 + 2 · 9216)", f"{lora(large, r=16):,}"),
        (
            "Llama-2-70B, all linear",
            "",
            "80 · 16 · (2 · 16384 + 2 · 9216 + 3 · 36864)",
            f"{lora(large, r=16, targets=None):,}",
        ),
    ]
    return section(
        "## LoRA at r = 16, counted",
        """Each adapted weight gets A (r × in) and B (out × r): r · (in + out) parameters. On a square d × d weight that is 2
        · r · d.""",
        table(("what", "the article says", "formula", "recomputed for the real model"), rows),
        f"""**Of the real models.** The first is right. `trainable params: 13,631,488` under an all-linear Llama-2-7B is the
        output of another run: q, k, v and o of a model with 32 layers of 4096 and 8 key/value heads, such as Llama-3-8B
        ({lora("llama-3-8b", r=16):,}) or Mistral-7B ({lora("mistral-7b-v0.1", r=16):,}). And 83,886,080 assumes that every
        projection of the 70B model is 8192 × 8192, as in LLaMA-65B ({lora("llama-65b", r=16):,}); Llama-2-70B has 8
        key/value heads of 128, so its k and v have 1024 outputs.""",
    )


def gpt3_targets() -> str:
    targets = (
        ("Wq", "4.7M", ("q_proj",)),
        ("Wq + Wv", "9.4M", ("q_proj", "v_proj")),
        ("Wq + Wk + Wv + Wo", "18.9M", OPT_ATTENTION),
    )
    counts = [lora(GPT3, r=2, targets=names) for _, _, names in targets]
    rows = [
        (what, says, f"96 · {len(names)} · 2 · 2 · 12288", f"{count:,} = {millions(count)}")
        for (what, says, names), count in zip(targets, counts, strict=True)
    ]
    equal = [
        f"r = {r} on {what} ({millions(lora(GPT3, r=r, targets=names))})"
        for r, (what, _, names) in zip((8, 4, 2), targets, strict=True)
    ]
    return section(
        "## GPT-3 175B, by targets",
        f"""GPT-3 is not a Hugging Face model. Its shape is built here from an OPT-type config, with separate q, k, v and
        output projections and learned positions: d = 12288, 96 layers; {load(GPT3).num_parameters:,} parameters in all, with
        the two unused rows of OPT's position table. One d × d weight per layer costs layers · 2 · r · d.""",
        table(COLUMNS, rows),
        f"""**Of the real model.** True, at r = 2. The LoRA paper (arXiv 2106.09685, table 5) compares targets the other way
        round: it keeps the count and lowers the rank, {", ".join(equal)}.""",
    )


def gpt3_ranks() -> str:
    qv = ("q_proj", "v_proj")
    says = {1: "0.3M", 64: "18.9M"}
    rows = []
    for r in (1, 2, 4, 8, 16, 32, 64):
        small, real = (lora(model, r=r, targets=qv) for model in (SMALLER, GPT3))
        rows.append((f"r = {r}", says.get(r, ""), f"{small:,} = {millions(small)}", f"{real:,} = {millions(real)}"))
    return section(
        "## GPT-3 175B, by rank",
        """On q and v the count is layers · 2 · 2 · r · d, so it doubles with the rank. The article's column runs from 0.3M at
        r = 1 to 18.9M at r = 64.""",
        table(("rank", "the article says", "48 layers of d = 1536", "GPT-3: 96 layers of d = 12288"), rows),
        f"""**Of the real model.** The column is not GPT-3's: at r = 1, q and v already take
        {millions(lora(GPT3, r=1, targets=qv))}, the smaller LoRA of the paper's table 4; its larger one,
        {millions(lora(GPT3, r=8, targets=qv))}, is r = 8. The article's column needs layers · d = 73,728, sixteen times less
        than GPT-3: 48 layers of d = 1536 have it, and so have 24 of 3072. The paper has a 0.3M too, but for RoBERTa-base at r =
        8: {lora("roberta-base", r=8, targets=("query", "value")):,}.""",
    )


def num_layers(name: str) -> int:
    """Layers of a built-in decoder."""
    prompt = load(name).prompt
    assert prompt is not None
    return prompt.num_layers


def factors() -> str:
    one: dict[str, Any] = {"target_modules": ("q_proj",)}
    layers = num_layers("llama-2-7b")
    svd = trainable("llama-2-7b", method="adalora", init_r=16, **one) // layers
    plain = trainable("llama-2-7b", method="lora", r=16, **one) // layers
    return section(
        "## Low-rank factors of one 4096 × 4096 weight",
        """A factorisation U · Σ · V of rank r keeps r columns, r rows and r singular values: r · (2d + 1).""",
        table(COLUMNS, [("d = 4096, r = 16", "131,088", "16 · (2 · 4096 + 1)", f"{svd:,}")]),
        f"""**Of the real methods.** This is AdaLoRA's count, which does keep the diagonal. LoRA has none: 2 · 16 · 4096 =
        {plain:,}, beside the {4096 * 4096:,} of the weight.""",
    )


def prefix() -> str:
    rows = []
    for name, title, says in (
        ("llama-2-7b", "Llama-2-7B", "5,242,880"),
        ("llama-3-8b", "Llama-3-8B", ""),
        ("llama-2-70b", "Llama-2-70B", ""),
    ):
        layers, d = num_layers(name), load(name).hidden_size
        real = trainable(name, method="prefix-tuning", num_virtual_tokens=20)
        rows.append((title, says, f"2 · {layers} · 20 · {d} = {2 * layers * 20 * d:,}", f"{real:,}"))
    return section(
        "## Prefix tuning",
        """A key and a value for each of p virtual tokens in each of L layers: 2 · L · p · d, here with p = 20.""",
        table(("what", "the article says", "formula", "recomputed for the real model"), rows),
        """**Of the real models.** Right where keys and values are as wide as the model. Under grouped-query attention peft
        trains them at their true width, key/value heads · head_dim: 1024 for the last two, so that the formula is four and
        eight times too high.""",
    )


def houlsby() -> str:
    result = estimate("llama-2-7b", method="houlsby", bottleneck_size=64)
    weights = sum(t.copies * prod(t.shape) for t in result.adaptation.added if t.name.endswith(".weight"))
    return section(
        "## Houlsby adapters",
        """Two bottlenecks per layer, each a projection down to m = 64 and one up again: 2 · L · 2 · m · d.""",
        table(COLUMNS, [("32 layers of d = 4096", "≈ 33.6M", "2 · 32 · 2 · 64 · 4096", f"{weights:,} = {millions(weights)}")]),
        f"""**Of the real adapters.** Both projections have a bias, m + d more per bottleneck: {result.trainable_parameters:,}
        for Llama-2-7B as AdapterHub's library builds them. peft has no such method.""",
    )


def ia3() -> str:
    wide = trainable({**LLAMA_7B, "intermediate_size": 16384}, method="ia3")
    return section(
        "## (IA)³",
        """One scale for each key, each value and each input of the last MLP layer: L · (d + d + d_ff).""",
        table(COLUMNS, [("32 layers of d = 4096, d_ff = 16384", "786,432", "32 · (4096 + 4096 + 16384)", f"{wide:,}")]),
        f"""**Of the real models.** d_ff = 4 · d is the first Transformer's; Llama-2-7B's is 11008, which gives
        {trainable("llama-2-7b", method="ia3"):,}. Under grouped-query attention keys and values are narrower too: Llama-3-8B,
        with d_ff = 14336 and 1024 for each, has {trainable("llama-3-8b", method="ia3"):,}.""",
    )


def nf4(*, double_quant: bool) -> tuple[Allocation, ...]:
    """The tensors of a 4096 × 4096 weight in NF4."""
    return stored(parse_quant("nf4", double_quant=double_quant), shape=(4096, 4096), dtype="bf16")


def absmax_bits(*, double_quant: bool) -> float:
    """Bits per parameter of that weight's scales, both levels; tables of fixed size are left out."""
    return sum(8 * a.nbytes for a in nf4(double_quant=double_quant) if a.name.endswith("absmax")) / 4096**2


def double_quantization() -> str:
    nested = bnb.NESTED_BLOCKSIZE
    rows = [
        ("one scale per block", "0.5 bits", "32 / 64", f"{absmax_bits(double_quant=False):.3f} bits"),
        ("double quantized", "0.127 bits", f"8 / 64 + 32 / (64 · {nested})", f"{absmax_bits(double_quant=True):.3f} bits"),
    ]
    tables = sum(a.nbytes for a in nf4(double_quant=True) if a.name in ("code", "nested_code", "offset"))
    plain, double = (
        estimate("llama-65b", method="qlora", double_quant=on).static.by_category()["quant_state"] for on in (False, True)
    )
    return section(
        "## Double quantization",
        f"""One fp32 scale (absmax) for each block of 64 weights costs half a bit per weight. Double quantization stores the
        scales in 8 bits, with one fp32 scale for each {nested} of them.""",
        table(COLUMNS, rows),
        f"""**Of the real model.** True; each quantized weight also has tables of {tables:,} bytes, whatever its size. All of
        it, as the CUDA allocator stores it for LLaMA-65B: {gb(plain)} without and {gb(double)} with double quantization.""",
    )


def levels() -> str:
    rows = [(str(i), f"{p:.4f}", f"{level:.5f}") for i, (p, level) in enumerate(nf4_levels())]
    return section(
        "## NF4's sixteen levels",
        f"""The levels are quantiles of the normal distribution, divided by the largest. They are two halves with equal steps
        of probability between ½ and {1 - NF4_TAIL:.7f}: eight levels above zero, seven below, and zero itself.""",
        table(("index", "probability", "level"), rows),
        f"""**Of the real table.** bitsandbytes stores these levels as fp32 constants. The QLoRA paper's equation 4 (arXiv
        2305.14314), ½ · (Q(i/17) + Q((i+1)/17)), does not give them as printed: Q(0) and Q(1) are infinite, so only i = 1 …
        15 count, and those {len(equation_4())} levels are symmetric around zero; scaled to ±1, the second is
        {equation_4()[1]:.5f} instead of {nf4_levels()[1][1]:.5f}. The two halves are in the text that follows the equation.""",
    )


def adapter_files() -> str:
    cases = (
        ("Llama-2-7B, r = 8, q v (peft's default)", "llama-2-7b", 8, ("q_proj", "v_proj")),
        ("Llama-2-7B, r = 16, q k v o", "llama-2-7b", 16, ATTENTION),
        ("Llama-2-7B, r = 16, all linear", "llama-2-7b", 16, None),
        ("Llama-2-70B, r = 16, all linear", "llama-2-70b", 16, None),
    )
    rows = []
    for title, model, r, targets in cases:
        added = estimate(model, method="lora", r=r, target_modules=targets).adaptation.added
        sizes = (file_bytes(added, dtype=dtype) for dtype in ("fp32", "bf16"))
        rows.append((title, *(f"{size:,} = {size / MB:.1f} MB" for size in sizes)))
    return section(
        "## Adapter files",
        """The article puts an adapter file at about 50 to 100 MB. An `adapter_model.safetensors` is 8 bytes, a JSON header
        that names every tensor, and the tensors in the dtype that they were trained in: fp32, unless peft is told otherwise.""",
        table(("bytes of the file", "fp32", "bf16"), rows),
        """**Of the real files.** The range holds for a 7B model at r = 16: q, k, v and o in fp32, or all linear layers in
        bf16. The size follows the rank and the model, so neither end is a limit.""",
    )


SECTIONS = (
    introduction, rule, lora_and_qlora, lora_counts, gpt3_targets, gpt3_ranks, factors, prefix, houlsby, ia3,
    double_quantization, levels, adapter_files,
)  # fmt: skip


def as_text() -> str:
    """The page."""
    return "\n\n".join(part() for part in SECTIONS) + "\n"


if __name__ == "__main__":
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(as_text(), encoding="utf-8")
