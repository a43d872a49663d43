"""Text that is generated on the card has the length that was asked for: no value says that a sequence has ended."""

from __future__ import annotations

import sys
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport


class Length:
    """Whether the sequences that are being generated are as long as they may become."""

    def __init__(self) -> None:
        self.reached = False

    def watch_criteria(self, module: Any) -> None:
        """Compare the length with the longest that is allowed, whenever it is asked whether to stop."""
        criteria = module.StoppingCriteriaList
        call = criteria.__call__

        def watched(stopping: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            longest = stopping.max_length
            self.reached = longest is not None and input_ids.shape[1] >= longest
            return call(stopping, input_ids, *args, **kwargs)

        criteria.__call__ = watched

    def watch_loop(self, module: Any) -> None:
        """Let the loop of a model on the card go on until then."""
        mixin = module.GenerationMixin
        generate, unfinished = mixin.generate, mixin._has_unfinished_sequences

        def from_nothing(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.reached = False
            return generate(model, *args, **kwargs)

        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            return not self.reached if model.device.type == "cuda" else unfinished(model, *args, **kwargs)

        mixin.generate, mixin._has_unfinished_sequences = from_nothing, watched


def start() -> None:
    """Watch transformers' generation, once the program imports it."""
    length = Length()
    actions = {
        "transformers.generation.stopping_criteria": length.watch_criteria,
        "transformers.generation.utils": length.watch_loop,
    }
    sys.meta_path.insert(0, AfterImport(actions))
