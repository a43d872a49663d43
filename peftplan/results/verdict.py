"""Whether a job fits a card, as data."""

from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from peftplan.results.verdict_documents import VerdictDocument

TIGHT = 0.05
"""Less than this share of a card left over is tight."""


class Verdict(NamedTuple):
    """Whether a job fits a card: `fits`, `tight`, `does_not_fit`, `does_not_run` or `unknown` (`planning.verdicts` defines them).

    `needed_bytes` are what torch's allocator reserves without a limit, with the card's own kernels, and the CUDA context. If
    there is no peak, they are the persistent bytes, and `lower_bound` is true. `headroom_bytes` are usable - needed.
    """

    gpu: str
    usable_bytes: int
    why: str
    """Where the number of usable bytes comes from."""
    verdict: str
    needed_bytes: int
    context_bytes: int
    """The CUDA context inside `needed_bytes`."""
    context_source: str
    context_assumed: bool = False
    """Whether the context is that of another card, because this card's is not known."""
    lower_bound: bool = False
    runs_by_releasing_cache: bool = False
    """Whether the job needs more than is usable, and runs only because the allocator releases cached memory before it fails."""
    scope: str | None = None
    """`text` if the job's images are not counted."""
    reason: str | None = None
    """Why the job does not run, with the line of the library that raises."""
    upper_bound: bool = False
    """Whether unsupported keys of a file make the job need less than `needed_bytes`."""
    vllm_bytes: int = 0
    """What vLLM takes inside `needed_bytes`, where it generates on the training GPU."""

    @property
    def headroom_bytes(self) -> int:
        """Usable bytes that the job leaves; negative if it needs more."""
        return self.usable_bytes - self.needed_bytes

    @property
    def words(self) -> str:
        """The verdict as a person reads it, with its scope."""
        scope = "" if self.scope is None else f", {self.scope} only"
        released = ", runs because torch releases cached memory" if self.runs_by_releasing_cache else ""
        return self.verdict.replace("_", " ") + scope + released

    @property
    def runtime_context(self) -> int | None:
        """The CUDA context where it is known of this card, or was given."""
        return None if self.context_assumed else self.context_bytes

    @property
    def device_total(self) -> int | None:
        """What nvidia-smi shows for the process; None where the context or the peak is not known."""
        return None if self.context_assumed or self.lower_bound or self.upper_bound else self.needed_bytes

    def to_dict(self) -> "VerdictDocument":
        """One entry of `gpus` in the JSON."""
        scope = {} if self.scope is None else {"scope": self.scope}
        facts = {
            "name": self.gpu,
            "usable_bytes": self.usable_bytes,
            "usable_source": self.why,
            "verdict": self.verdict,
            **scope,
            "reason": self.reason,
            "needed_bytes": self.needed_bytes,
            "needed_is_lower_bound": self.lower_bound,
            **({"needed_is_upper_bound": True} if self.upper_bound else {}),
            **({"vllm_bytes": self.vllm_bytes} if self.vllm_bytes else {}),
            "context_bytes": self.context_bytes,
            "context_assumed": self.context_assumed,
            "context_source": self.context_source,
            "runtime_context": self.runtime_context,
            "device_total": self.device_total,
            "headroom_bytes": self.headroom_bytes,
            "runs_by_releasing_cache": self.runs_by_releasing_cache,
        }
        return cast("VerdictDocument", facts)
