"""Versions of transformers and peft that lack what today's have: told by what is there, not by number."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers.masking_utils

from peftplan.errors import RefusedError
from peftplan.job.resolving import resolved
from peftplan.job.setup import Setup, parse_setup
from peftplan.libraries.replacing import replaced
from peftplan.trace.checkpointing import checkpoint_layers


def test_only_what_is_there_is_replaced() -> None:
    before = transformers.masking_utils.create_causal_mask
    stand_ins = {
        "transformers.masking_utils.create_causal_mask": len,
        "transformers.masking_utils.no_such_name": len,
        "transformers.no_such_module.name": len,
    }
    with replaced(stand_ins):
        assert transformers.masking_utils.create_causal_mask is len
        assert not hasattr(transformers.masking_utils, "no_such_name")
    assert transformers.masking_utils.create_causal_mask is before


def test_the_versions_here_have_all_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that renames what a trace replaces would be traced as it is on the CPU: it has to be seen here."""
    pytest.importorskip("peft")
    from peftplan.libraries import replacing, stand_ins
    from tests.trace.engine_case import llama, lora, traced

    is_present: dict[str, bool] = {}
    is_there = replacing._is_there
    monkeypatch.setattr(replacing, "_is_there", lambda target: is_present.setdefault(target, is_there(target)))
    traced(llama(layers=1), lora(), seq_len=8, quant="nf4")
    is_present |= {target: is_there(target) for targets in stand_ins.STAND_INS.values() for target in targets}
    assert {"transformers.masking_utils.fast_all", "peft.tuners.boft.layer.Linear.forward"} <= is_present.keys()
    assert [target for target, there in is_present.items() if not there] == []


class Older:
    """A model of transformers 5.0."""

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Takes no more than this."""
        self.kwargs = gradient_checkpointing_kwargs


def setup(**options: Any) -> Setup:
    return resolved(parse_setup(options), quantized=False, supports_sdpa=True, use_cache=True)


def test_an_older_model_is_asked_in_its_own_words() -> None:
    model = Older()
    checkpoint_layers(model, setup(use_reentrant=True))
    assert model.kwargs == {"use_reentrant": True}


@pytest.mark.parametrize(
    ("options", "name"), [({"every_n_layers": 2}, "every_n_layers"), ({"offload_checkpoints": True}, "offload_checkpoints")]
)
def test_what_an_older_model_does_not_know_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(RefusedError, match=f"{name}: transformers .* does not have it"):
        checkpoint_layers(Older(), setup(**options))
