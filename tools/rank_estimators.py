"""What other estimators say of rehearsed jobs over several GPUs: `python -m tools.rank_estimators` writes the table of the page.

It runs DeepSpeed's and accelerate's own functions, in an environment that has both. Megatron's formula is that of its
training/theoretical_memory_usage.py, for tensor parallelism without a pipeline.
"""

from __future__ import annotations

from typing import Any

from tools import marked
from tools.rank_jobs import PAGE, compared, options, rows

MARKS = ("<!-- other estimators -->", "<!-- end of other estimators -->")
JOBS = {
    "zero2 full 4": "ZeRO-2, full",
    "zero2 full 64": "ZeRO-2, full",
    'zero2 full 4 zero={"offload_optimizer": {"device": "cpu"}}': "ZeRO-2, full, optimizer on the host",
    "zero2 lora 4": "ZeRO-2, LoRA",
    "zero3 full 4": "ZeRO-3, full",
    "zero3 lora 4": "ZeRO-3, LoRA",
    "fsdp2 full 8 checkpointing=false": "FSDP2, full, no checkpointing",
    "ddp lora 4": "DDP, LoRA",
    'tp full 4 model="llama-3.2-1b" layers=3': "tensor parallel, full",
    'tp full 8 model="llama-3.1-8b" layers=2': "tensor parallel, full",
}
"""Jobs of tools/rank_grid.py, and what the table calls them. Models are Llamas of two or three layers, 512 tokens."""
HEADER = ("job", "ranks", "rehearsed peak", "peftplan", "DeepSpeed", "accelerate", "Megatron")


def table() -> str:
    """The table as Markdown: bytes of one rank, and how far each is off."""
    by_name = {row["name"]: row for row in rows()}
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    for name, called in JOBS.items():
        row = by_name[name]
        measured = max(row["peak_by_phase"].values())
        cells = [called, str(row["world"]), f"{measured:,}"]
        cells += [cell(value, measured) for value in (ours(row), _deepspeed(row), _accelerate(row), _megatron(row))]
        lines.append(tuple(cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: int | None, measured: int) -> str:
    """Bytes that an estimator says, and how far they are from those of the rehearsal; below 1 % with three decimals."""
    if value is None:
        return "–"
    percent = 100 * (value / measured - 1)
    return f"{value:,} ({percent:+.{1 if abs(percent) >= 1 else 3}f} %)"


def ours(row: dict[str, Any]) -> int:
    """peftplan's, of the phase in which the rehearsal peaked."""
    shares = compared(row)
    assert shares is not None
    phase = max(row["peak_by_phase"], key=row["peak_by_phase"].get)
    return round((1 + shares[phase]) * row["peak_by_phase"][phase])


def _elements(row: dict[str, Any]) -> int:
    import peftplan

    return peftplan.estimate(**options(row)).total_parameters


def _deepspeed(row: dict[str, Any]) -> int | None:
    """`estimate_zero2_model_states_mem_needs` and `estimate_zero3_…`, as their `all_live` calls them: of all parameters, of which
    those of the largest module are the token embedding's.
    """
    offloads = "offload_optimizer" in row["name"]
    if row["strategy"] == "zero2":
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        return int(estimate_zero2_model_states_mem_needs(_elements(row), row["world"], 1, cpu_offload=offloads)[1])
    if row["strategy"] != "zero3":
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    config = options(row)["model"]
    table = config["vocab_size"] * config["hidden_size"]
    return int(
        estimate_zero3_model_states_mem_needs(
            _elements(row), table, row["world"], 1, cpu_offload=offloads, cpu_offload_params=False
        )[1]
    )


def _accelerate(row: dict[str, Any]) -> int:
    """`accelerate estimate-memory`: the largest of its numbers for training with Adam in bf16, which knows no ranks."""
    from accelerate.commands.estimate import estimate_training_usage

    return int(max(estimate_training_usage(4 * _elements(row), "bfloat16").values()))


def _megatron(row: dict[str, Any]) -> int | None:
    """`compute_weight_and_optimizer_memory` (18 B a parameter) and `compute_activation_memory`, of one micro batch."""
    if row["strategy"] != "tp":
        return None
    config = options(row)["model"]
    s, b, h, v = row["program"].get("seq_len", 512), 1, config["hidden_size"], config["vocab_size"]
    layers = s * b * h * (18 + 4 * config["intermediate_size"] / h) * config["num_hidden_layers"]
    ends = 8 * s * b + s * b * h + s * b * h * 4 * (1 + v / h)
    return round((18 * _elements(row) + layers + ends) / row["world"])


if __name__ == "__main__":
    marked.write(PAGE, MARKS, table())
