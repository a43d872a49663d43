"""The facts of kernels that decide memory: a record for each kind of kernel, which `job.kernels` fills by package."""

from typing import NamedTuple, TypeAlias


class Norm(NamedTuple):
    """An RMSNorm that saves its input and one fp32 number per row.

    `reuses_gradient`: the gradient of the input is written into that of the result. `partial_rows`: rows of the fp32 sums that
    make the gradient of the weight, per multiprocessor of the card; 0 where it is made in its own dtype at once. `in_python`: it
    is a function of Python's, whose gradient is a view.
    """

    source: str
    reuses_gradient: bool = True
    partial_rows: int = 1
    in_python: bool = True
    of_narrow: tuple[tuple[int, int], ...] = ()
    """Widths up to which they are another number of rows, and that number."""

    def rows_of(self, width: int) -> int:
        """Rows of sums for each multiprocessor."""
        return next((rows for most, rows in self.of_narrow if width <= most), self.partial_rows)


class Rotary(NamedTuple):
    """Rotary embedding of queries and keys, written where they lie.

    `backward_in_place`: so are their gradients. `norms`: where queries and keys are normed by head, one function does both, into
    new tensors. `partial_rows`: queries and keys have a function each, and so many rows of fp32 sums per multiprocessor make the
    gradient of the norm's weight, whether it trains or not.
    """

    source: str
    backward_in_place: bool
    norms: bool = False
    partial_rows: int = 0


class Gated(NamedTuple):
    """The product of an activated gate and its partner: saves both, and writes their gradients where they lie."""

    source: str


class Lora(NamedTuple):
    """Projections with LoRA in one function, which saves the input and, of an MLP, gate and partner.

    `overwrites_input`: the gradient of the input is written where the input lies. `saves_casts`: the adapter in the dtype of the
    input is saved; else it is cast again in backward. `global_buffer`: in forward a 4-bit weight goes into one buffer per card,
    which grows to the largest of them and stays. `wide_gradients`: an fp32 adapter's gradient is made in fp32. `takes_bias`: also
    projections with a bias. `drops_outside`: dropout runs before the function, once for projections that read one input;
    `drops_inside`: it runs inside, for each projection, whose mask is saved.
    """

    source: str
    overwrites_input: bool = False
    saves_casts: bool = False
    global_buffer: bool = False
    wide_gradients: bool = False
    takes_bias: bool = False
    drops_outside: bool = False
    drops_inside: bool = False


class LayerNorms(NamedTuple):
    """LayerNorms, which models with RMSNorms alone do not have."""

    source: str


class Decoder(NamedTuple):
    """A decoder's own forward: without an attention mask in training, with rotary tables of so many positions that stay."""

    source: str
    positions: int


class CompiledLayers(NamedTuple):
    """Layers that torch compiles whole, as `job.compiled_layers` has records of them.

    `scheme`: how torchao fake-quantizes their linear layers, as Unsloth's `qat_scheme` names it. `rows`: the rows of a batch stay
    apart, as a collator of the program's own makes them. `tiles`: MLPs run over as many tokens at once as a hidden state has
    numbers. `by_function`: the loss is that of `memory.unsloth_function_loss`, whatever the record's was.
    """

    source: str
    scheme: str = ""
    rows: bool = False
    tiles: bool = False
    by_function: bool = False


class PaddingFree(NamedTuple):
    """Batches that are one row without padding: each row of the batch is a document, of which attention makes segments.

    Position ids are passed, so queries and keys are rotated into new tensors, and rotary tables cover all positions of the model.
    """

    source: str


class Checkpoint(NamedTuple):
    """Checkpointing that keeps the inputs of layers, the last one's excepted, in host memory.

    In backward they come through `buffers` buffers of one hidden state, which last. `least_bytes`: smaller inputs stay there.
    """

    source: str
    buffers: int
    least_bytes: int


class HostEmbedding(NamedTuple):
    """An input embedding that is moved to host memory once the model is loaded. Its rows are looked up there."""

    source: str


class SeparateExperts(NamedTuple):
    """Experts of a mixture that are linear layers of their own, in a list, and run one after the other."""

    source: str


class Scan(NamedTuple):
    """Mamba 2's mixer behind its first projection, with the last one, in one function (`memory.state_space`)."""

    source: str


class Rule(NamedTuple):
    """The gated delta rule in one function (`memory.delta_kernels`)."""

    source: str


class OffloadedActivations(NamedTuple):
    """What operations save for backward goes to host memory, but for what several of them save (`tape.offloaded`).

    `by_layer`: layer by layer, and all that a layer saves (`tape.grouped`).
    """

    source: str
    by_layer: bool = False


class FakeQuantized(NamedTuple):
    """Linear layers whose inputs and weights are rounded to few values in forward, weights by groups of so many of a row.

    `by_range`: gradients reach the least and the greatest value of a group too. `in_mx`: both are stored in 4 bits until backward
    (`memory.mx_quantized`).
    """

    source: str
    group: int
    by_range: bool = False
    in_mx: bool = False


class Float8(NamedTuple):
    """Linear layers but the head that compute in 8 bits with one scale per tensor; FSDP2 gathers their weights in 8 bits."""

    source: str


class Documents(NamedTuple):
    """Attention of packed rows that lie behind each other, which is told where each document begins."""

    source: str


class Exchange(NamedTuple):
    """The exchange of tokens between ranks that divide experts, beside Transformer Engine's attention and sorting of rows.

    `replays`: recomputation finds where tokens went. `hybrid`: rows come sorted by expert.
    """

    source: str
    replays: bool = True
    hybrid: bool = False


class Balanced(NamedTuple):
    """Routing without weights, which sends as many tokens to each expert."""

    source: str


class ByOperation(NamedTuple):
    """Adapters operation by operation, in place of a trainer's autograd function."""

    source: str


class Remade(NamedTuple):
    """The residual within a layer that torch compiles whole around its checkpoints: the layer's result overwrites it, and
    backward makes it again."""

    source: str


class CompiledAttention(NamedTuple):
    """Attention that torch compiles whole, from its input to its result."""

    source: str


class Scales(NamedTuple):
    """One for so many numbers of a row, or of a column."""

    numbers: int
    dtype: str


class Narrow(NamedTuple):
    """How layers compute in 8 bits: the scales of what they read, and of weights, None where they are few."""

    scales: Scales | None = None
    of_weights: Scales | None = None
    rows: int = 16
    """What rows of an expert are a multiple of; else the tool pads them (pytorch/quantization.py,
    `get_align_size_for_quantization`)."""


class Projections(NamedTuple):
    """Linear layers, or those of experts one by one, of Transformer Engine, which keeps workspaces of cuBLASLt for them."""

    source: str
    workspaces: int = 1
    narrow: Narrow | None = None
    """How they, and the package's other linear layers, compute in 8 bits: of experts' weights, copies by row and by column stay
    from the first forward on."""


Part: TypeAlias = (
    CompiledLayers
    | FakeQuantized
    | Float8
    | Documents
    | HostEmbedding
    | SeparateExperts
    | Decoder
    | PaddingFree
    | Checkpoint
    | OffloadedActivations
    | Scan
    | Rule
    | Exchange
    | Balanced
    | ByOperation
    | Remade
    | CompiledAttention
    | Projections
)
Kernel: TypeAlias = Part | Norm | Rotary | Gated | Lora | LayerNorms
