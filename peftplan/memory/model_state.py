"""What a model holds while it runs, and the sizes and rules of its run that its code asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftplan.depth.copies import Stack
from peftplan.ledger import Dim
from peftplan.memory import fake_quantized
from peftplan.memory.parts import Adapter
from peftplan.memory.units import ONE_GPU, Units
from peftplan.memory.weights import Weights
from peftplan.methods.adaptation import PROMPTED
from peftplan.tape.tensors import Dims, Tensor

if TYPE_CHECKING:
    from peftplan.depth.skipped import Skipped


@dataclass(eq=False, repr=False)
class ModelState(Weights):
    """Weights with what lives beside them: the batch, outputs, locals of a forward, and what waits for a later one."""

    adapter: Adapter | None = None
    kept: list[object] = field(default_factory=list)
    """What the outputs hold besides logits: the KV cache."""
    can_cache: bool = True
    """Whether the class makes a KV cache in training: encoders have none."""
    outputs: list[Tensor] = field(default_factory=list)
    """Tensors of the outputs besides loss and logits."""
    batch: dict[str, Tensor] = field(default_factory=dict)
    """The micro batch, by the names of the forward's arguments."""
    other_batches: list[Tensor] = field(default_factory=list)
    """The tensors of the step's other micro batches, where they are on the device too."""
    ends: bool = True
    """Whether the final norm is its own: not in a stage of a pipeline before the last."""
    received: Tensor | None = None
    """What a stage of a pipeline receives in place of embeddings."""
    mask: Tensor | None = None
    """The attention mask, extended by virtual tokens."""
    own_mask: Tensor | None = None
    """The mask that a trainer makes of its own."""
    layer_locals: list[Tensor] = field(default_factory=list)
    """Tensors that local variables of a layer keep alive until it returns, such as the weights of eager attention."""
    call_locals: list[Tensor] = field(default_factory=list)
    """Tensors that local variables of the model's or peft's forward keep alive until it returns."""
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Keys and values of virtual tokens that no layer has consumed yet."""
    copied_past: Tensor | None = None
    """Those of the copied layers."""
    waiting: list[Tensor] = field(default_factory=list)
    """Gradients of copied layers that are allocated outside the layers."""
    stacks: list[Stack] = field(default_factory=list)
    left_out: list[Skipped] | None = None
    """Stacks of which layers are left out; None where all run."""
    leaves_out: Callable[[str, int], Skipped | None] = lambda stack, layers: None
    """A stack, and how many layers it has → which may be left out, where the units know what these do."""
    buffers: list[Tensor] = field(default_factory=list)
    """Tensors of the hidden states' dims that stay on the card, through which offloaded inputs come back."""
    lasting: list[Tensor] = field(default_factory=list)
    """What else a package keeps on the card from step to step."""
    lingering: list[Tensor] = field(default_factory=list)
    """What the nodes of a graph keep after backward, up to the next forward: something still refers to one of its tensors."""
    handed_on: list[Tensor] = field(default_factory=list)
    """Keys and values that layers hand on beside their result, up to the end of backward."""
    dispatcher: list[Tensor] = field(default_factory=list)
    """What the dispatcher of all layers' experts holds of the latest exchange, and with it that layer's graph."""
    compiled: list[Tensor] = field(default_factory=list)
    """What attention that torch compiled keeps of the layer that runs, which a graph that the dispatcher holds keeps too."""
    scales: fake_quantized.Scales = field(default_factory=dict)
    """Scales that fake-quantized layers keep until their next forward."""
    on_host: list[tuple[Dims, str, int]] = field(default_factory=list)
    """Dims and dtype of tensors that wait on the host while a micro batch runs, and how many there are."""
    micro_batch: int = 0
    """The number of the current micro batch: each has its own stacks."""
    router_logits: list[Tensor] | None = None
    """Those of each layer's router, while a forward hands them to the load-balancing loss."""
    load_loss: Tensor | None = None
    """That loss, until it is added to the model's own."""
    pass_name: str = ""
    """Tells the forwards of a step apart where it has several."""
    units: Units = ONE_GPU
    """What happens around parts of the model whose parameters are gathered from shards."""

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens the method puts before each sequence, or before its keys and values."""
        return getattr(self.running.config, "num_virtual_tokens", None) or 0

    @property
    def seq(self) -> str:
        """The named size of the hidden states' sequence, of an encoder-decoder that of the decoder."""
        return "k" if self.running.peft_type in PROMPTED and not self.translates else "s"

    @property
    def translates(self) -> bool:
        """Whether an encoder reads the batch and a decoder its labels: virtual tokens come before what the encoder reads."""
        return self.arch.task_type == "SEQ_2_SEQ_LM"

    @property
    def source(self) -> str:
        """The named size of an encoder's sequence."""
        return "k" if self.running.peft_type in PROMPTED else "s"

    @property
    def keys(self) -> str:
        """The named size of the keys and values that a causal layer's queries see."""
        return "k" if self.virtual_tokens and not (self.translates and self.running.peft_type in PROMPTED) else "s"

    @property
    def key_len(self) -> int:
        """Their length."""
        return self.length(self.keys)

    def length(self, dim: Dim) -> int:
        """A sequence's length by its named size."""
        if isinstance(dim, int):
            return dim
        return self.running.seq_len + (self.virtual_tokens if dim == "k" else 0)

    @property
    def hosted(self) -> bool:
        """Whether the inputs of checkpointed layers wait on the host."""
        return self.running.hosted

    @property
    def keeps_last(self) -> bool:
        """Whether the input of the last checkpointed layer stays on the card all the same."""
        return self.running.hosted and self.running.kernels.checkpoint is not None and not self.running.scores_first

    @property
    def last_apart(self) -> bool:
        """Whether the last layer's gradient is a view, to which autograd adds into a new tensor: a kernel made it; or whether the
        last layer alone times its kernels."""
        norm = self.running.kernels.rms_norm
        return (norm is not None and norm.in_python) or self.running.tunes

    @property
    def caches(self) -> bool:
        """Whether the outputs hold a KV cache; with checkpointing transformers turns it off, and many classes with labels."""
        return self.can_cache and self.running.use_cache and not self.running.checkpointing

    @property
    def joins(self) -> bool:
        """Whether keys and values are copies that a cache made, head by head: it keeps them, or has a prefix before them."""
        return self.caches or (self.keys != self.seq and not self.translates)
