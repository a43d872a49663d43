"""The colours of a drawing."""

from __future__ import annotations

from peftplan.ledger import Category

COLOURS: dict[Category, str] = {
    "weights": "#4e79a7",
    "adapter_weights": "#a0cbe8",
    "quant_state": "#86bcb6",
    "gradients": "#e15759",
    "optimizer_states": "#f1ce63",
    "activations": "#59a14f",
    "logits": "#b07aa1",
    "temporaries": "#f28e2b",
    "buffers": "#79706e",
    "workspaces": "#bab0ac",
    "gathered_weights": "#d37295",
    "communication": "#9d7660",
}
"""One colour per category, from the ground up; Tableau's palette."""
