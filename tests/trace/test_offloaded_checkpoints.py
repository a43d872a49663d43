"""Inputs of checkpointed layers that wait on the host (transformers' `offload`), in the trace."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from peftplan.errors import InputError
from peftplan.job.resolving import resolved
from peftplan.job.setup import parse_setup
from peftplan.trace.cuda.hosted import SavedOnHost
from tests.trace.engine_case import HIDDEN, llama, lora, traced

SEQ = 512
STATES = 2 * SEQ * HIDDEN
"""Bytes of one layer's hidden states in bf16."""


@pytest.mark.parametrize(("layers", "every", "gone", "reentrant"), [(3, 1, 2, False), (3, 1, 2, True), (4, 2, 1, False)])
def test_the_forward_keeps_no_inputs_of_checkpointed_layers(layers: int, every: int, gone: int, reentrant: bool) -> None:
    """Of layers 0, 1, … the first one's input is the embedding, which its own leaf keeps."""
    options = {"every_n_layers": every, "use_reentrant": reentrant}
    here, away = (traced(llama(layers), lora(), seq_len=SEQ, offload_checkpoints=x, **options) for x in (False, True))
    assert here.peak_by_phase["forward"] - away.peak_by_phase["forward"] == gone * STATES
    assert {phase: here.peak_by_phase[phase] - away.peak_by_phase[phase] for phase in ("load", "step")} == {"load": 0, "step": 0}


def test_the_stand_in_gives_back_what_was_saved() -> None:
    """As torch's own `save_on_cpu`: same shape, dtype and device, dense, a new tensor each time."""
    saved = torch.ones(4, 6, dtype=torch.bfloat16).t().requires_grad_()
    seen = []
    for hooks in (SavedOnHost, torch.autograd.graph.save_on_cpu):
        with hooks(pin_memory=True):
            node = saved.exp().mul(saved).grad_fn
        x = node._saved_other
        seen.append((x.shape, x.dtype, x.device, x.is_contiguous(), x.data_ptr() != saved.data_ptr()))
    assert seen[0] == seen[1]


def test_without_checkpointing_nothing_waits_on_the_host() -> None:
    options = {"offload_checkpoints": True, "gradient_checkpointing": False}
    with pytest.raises(InputError, match="offload_checkpoints: there are none without gradient_checkpointing"):
        resolved(parse_setup(options), quantized=False, supports_sdpa=True, use_cache=False)
