"""Data of NeMo Automodel's recipes for retrieval, for rehearsals: queries with passages, each as long as `length` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODELS = {"automodel-bi-encoder": "BiEncoder", "automodel-cross-encoder": "CrossEncoder"}
"""The trainer → what its recipe and the class of its model are named by."""
MODULES = {"TrainBiEncoderRecipe": "retrieval.train_bi_encoder", "TrainCrossEncoderRecipe": "retrieval.train_cross_encoder"}
"""The recipe → its module in nemo_automodel/recipes."""


@dataclass
class Queries:
    """A component of a config: so many queries with so many passages each."""

    length: int
    count: int
    n_passages: int

    def build(self, tokenizer: Any = None) -> list[dict[str, Any]]:
        """What `collate` makes batches of."""
        tokens = [place % 90 + 5 for place in range(self.length)]
        return [{"query": tokens, "passages": [tokens] * self.n_passages}] * self.count


def sections(job: dict[str, Any], folder: str, count: int) -> dict[str, Any]:
    """What a config says of a job's recipe, model and data; `count`: of queries."""
    kind, named = MODELS[job["trainer"]], __name__
    model = {
        "_target_": f"nemo_automodel.NeMoAutoModel{kind}.from_pretrained",
        "pretrained_model_name_or_path": folder,
        "torch_dtype": "bfloat16",
        "pooling": "avg",
        "use_liger_kernel": "liger" in job.get("kernels", ""),
        **({"num_labels": 1} if kind == "CrossEncoder" else {"l2_normalize": True}),
    }
    tokenizer = {"_target_": "nemo_automodel.NeMoAutoTokenizer.from_pretrained", "pretrained_model_name_or_path": folder}
    data = {"_target_": f"{named}.Queries", "length": job["seq_len"], "count": count, "n_passages": job["n_passages"]}
    loader = {"collate_fn": {"_target_": f"{named}.collate", "apart": kind == "BiEncoder"}, "shuffle": False}
    recipe = {"recipe": f"Train{kind}Recipe", "model": model, "tokenizer": tokenizer, "dataset": data, "dataloader": loader}
    return recipe | {"loss_fn": None}


def collate(examples: list[dict[str, Any]], *, apart: bool) -> dict[str, Any]:
    """A batch as the tool's collators make it (components/datasets/llm/retrieval_collator.py): queries and passages `apart`, or
    texts of both and labels."""
    import torch

    queries = torch.tensor([example["query"] for example in examples])
    passages = torch.tensor([passage for example in examples for passage in example["passages"]])
    fields = {"d_input_ids": passages, "d_attention_mask": torch.ones_like(passages)}
    if apart:
        fields |= {"q_input_ids": queries, "q_attention_mask": torch.ones_like(queries)}
    else:
        fields = {name.removeprefix("d_"): field for name, field in fields.items()}
    return fields | {"labels": torch.zeros(len(examples), dtype=torch.long)}
