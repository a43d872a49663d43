"""The words by which options and facts of trainers name what there is."""

from typing import Literal

TrainerName = Literal[
    "plain",
    "transformers",
    "torchtune",
    "torchtune-dpo",
    "torchtune-kd",
    "trl",
    "trl-packed",
    "trl-ssd",
    "trl-dpo",
    "trl-kto",
    "trl-reward",
    "trl-grpo",
    "trl-rloo",
    "trl-orpo",
    "trl-cpo",
    "trl-tpo",
    "trl-gkd",
    "trl-gold",
    "trl-distillation",
    "trl-online-dpo",
    "trl-nash-md",
    "trl-xpo",
    "trl-ppo",
    "llamafactory",
    "llamafactory-asft",
    "llamafactory-dpo",
    "llamafactory-kto",
    "llamafactory-reward",
    "llamafactory-partial",
    "llamafactory-v1",
    "axolotl",
    "axolotl-dpo",
    "axolotl-kto",
    "axolotl-orpo",
    "axolotl-cpo",
    "axolotl-reward",
    "axolotl-grpo",
    "axolotl-ebft",
    "axolotl-ebft-strided",
    "axolotl-ebft-strided-scored",
    "axolotl-ebft-strided-full",
    "swift-text-part",
    "swift-dpo",
    "swift-dpo-packed",
    "swift-kto",
    "swift-reward",
    "swift-embedding",
    "swift-embedding-shared-rows",
    "swift-generative-reranker",
    "swift-generative-reranker-packed",
    "swift-generative-reranker-shared-rows",
    "swift-orpo",
    "swift-cpo",
    "swift-grpo",
    "swift-grpo-reloading",
    "swift-grpo-unhosted",
    "swift-grpo-grouped",
    "swift-grpo-entropies",
    "swift-grpo-taught",
    "swift-grpo-shared-rows",
    "swift-gkd",
    "swift-gkd-of-data",
    "swift-gkd-of-itself",
    "swift-gkd-with-labels",
    "qlora-paper",
    "sentence-transformers",
    "unsloth-sentence-transformers",
    "automodel",
    "automodel-hf",
    "automodel-vlm",
    "automodel-kd",
    "automodel-kd-beside",
    "automodel-bi-encoder",
    "automodel-cross-encoder",
]
Passages = Literal["apart", "with query"]
WordScores = Literal["rows", "texts of a row"]
Reference = Literal["none", "adapter_off", "copy"]
"""Where the reference model comes from: there is none, the policy without its adapter, or a second model."""
Loss = Literal[
    "auto", "full", "trl-chunked", "liger", "unsloth", "unsloth-logits", "torchtune-linear", "torchtune-chunked", "torchtune-kl",
    "full-no-upcast", "te-parallel", "per-token", "eaft", "eaft-behind", "shared-rows", "shared-rows-chunked",
    "cut-cross-entropy", "cut-apart", "received-kl", "masked-tokens",
]  # fmt: skip
Autocast = Literal["none", "bf16", "fp16"]
DeviceMap = Literal["none", "auto", "cuda", "cpu"]
"""How `from_pretrained` places a model: as it does by itself (a quantized one on the card, another on the host), by accelerate's
plan, or on one device, such as `cuda` for `{"": 0}` and `cpu` for `{"": "cpu"}`."""
Scoring = Literal["kernel", "flat kernel", "softmax", "divided softmax", "rows", "completions", "rows of completions"]
"""How log-probabilities of labels are made from all logits: by a kernel that reads a slice of them, by one that reads a copy of
the slice, by `log_softmax` of all, of all divided by a temperature, or of those of completions, or by `logsumexp` of one row
after another, or of its completion."""
