"""The task head of a model: what trains beside the adapter in the methods that peft does not have."""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.methods.adaptation import TrainedParam, trained_params

CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "IMAGE_CLS")
"""Tasks whose head starts from random weights."""


def head_params(arch: Architecture, tasks: tuple[str, ...] = CLASSIFICATION) -> tuple[TrainedParam, ...]:
    """The parameters outside the base model, except embeddings and what is tied to them; none for other tasks."""
    if arch.task_type not in tasks:
        return ()
    base = {m.name.partition(".")[0] for m in arch.modules if m.layers is not None}
    embeddings = {arch.input_embedding, arch.output_embedding}
    modules = tuple(m for m in arch.modules if m.name.partition(".")[0] not in base and m.name not in embeddings)
    tied = {owner for alias, owner in arch.ties if alias.rpartition(".")[0] in embeddings}
    return tuple(p for p in trained_params(arch, modules) if f"{p.module}.{p.param}" not in tied)
