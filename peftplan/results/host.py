"""Host memory and disk: what a job needs besides the card."""

from typing import NamedTuple

from peftplan.units import format_bytes

SMALL_FILES = "adapter_config.json or config.json, rng_state.pth, trainer_state.json, training_args.bin and tokenizer files"
"""What the sum of a checkpoint leaves out: about 30 KB, and the tokenizer's few MB where Trainer is given one."""


class Loading(NamedTuple):
    """Host memory that loading the model takes; `largest_tensor` passes through it even where the model does not stay there."""

    bytes: int
    largest_tensor: int
    how: str


class CheckpointFiles(NamedTuple):
    """The large files of one checkpoint. `optimizer_exact`: of another optimizer than torch's own, the container is close only.

    `model` is the adapter's file, or the files of the whole model where its base trains; None where it is not known.
    """

    model_name: str
    model: int | None
    optimizer: int
    optimizer_exact: bool
    scheduler: int

    @property
    def total(self) -> int:
        """The sum, as far as it is known."""
        return (self.model or 0) + self.optimizer + self.scheduler


class Host(NamedTuple):
    """Host memory and disk. Bytes; None is what does not exist or is not known.

    `offloaded` waits in host memory until backward, in pinned blocks of a power of two each; `paged` are optimizer states that
    leave a full card for it; `merging` is the peak of `merge_and_unload` on the CPU. `kept` checkpoints take `disk_kept` bytes,
    one more while the next is written.
    """

    loading: Loading
    offloaded: int
    paged: int
    merging: int | None
    checkpoint: CheckpointFiles
    save_total_limit: int | None
    ranks: int = 1
    """Processes on a node. What is above is that of one of them; they share the disk."""
    loading_ranks: int = 1
    """Those of them that load the model."""
    memory: int | None = None
    """What a node has, if the user says so (`host_memory`)."""

    @property
    def offloaded_per_node(self) -> int:
        """What all ranks of a node keep there while they train. It is pinned: the kernel cannot take it back."""
        return self.offloaded * self.ranks

    @property
    def loading_per_node(self) -> int:
        """What all ranks of a node load."""
        return self.loading.bytes * self.loading_ranks

    @property
    def why_short(self) -> str | None:
        """Why a node has too little memory; None where it has enough, or where it is not known how much it has."""
        if self.memory is None or self.offloaded_per_node <= self.memory:
            return None
        who = f"{self.ranks} ranks on a node keep" if self.ranks > 1 else "the job keeps"
        return f"host memory: {who} {format_bytes(self.offloaded_per_node)} there, and it has {format_bytes(self.memory)}"

    @property
    def disk_kept(self) -> int | None:
        """All checkpoints that Trainer keeps; None where it keeps every one."""
        return None if self.save_total_limit is None else self.save_total_limit * self.checkpoint.total

    @property
    def disk_peak(self) -> int | None:
        """The same while a new checkpoint is written beside them."""
        return None if self.disk_kept is None else self.disk_kept + self.checkpoint.total

    def to_dict(self) -> dict[str, object]:
        """The key `host` of the JSON."""
        return {
            "loading": self.loading._asdict(),
            "offloaded": self.offloaded,
            "paged": self.paged,
            "merging": self.merging,
            "checkpoint": {**self.checkpoint._asdict(), "total": self.checkpoint.total},
            "save_total_limit": self.save_total_limit,
            "disk_kept": self.disk_kept,
            "disk_peak": self.disk_peak,
            "ranks_per_node": self.ranks,
            "per_node": {"loading": self.loading_per_node, "offloaded": self.offloaded_per_node, "memory": self.memory},
        }
