"""What a run is made of: how it runs, and one module of one layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from peftplan.arrays import Fact
from peftplan.hardware.processors import A100, Processors
from peftplan.job.compiled_layers import Recorded
from peftplan.job.exchanges import Rows
from peftplan.job.kernels import Kernels
from peftplan.job.trainer_words import WordScores
from peftplan.ledger import Dim
from peftplan.methods.adaptation import MethodConfig
from peftplan.storage import QuantConfig
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor

if TYPE_CHECKING:
    from peftplan.memory.ring_attention import Ring
    from peftplan.storage.fused_products import Chip

NO_KERNELS = Kernels()
Config = TypeVar("Config", bound=MethodConfig)


class Running(NamedTuple):
    """Everything that decides how a step runs: resolved fields of the setup, the method's config, the card's kernels."""

    autocast: str | None
    checkpointing: bool
    attention: str
    padding: bool
    use_cache: bool
    keeps_keys: bool = False
    """Whether the outputs hold the keys and values of checkpointed layers, as views of the projection that gave them."""
    card: Processors = A100
    """Its multiprocessors, by which kernels size their buffers."""
    flash: bool = True
    """Whether the card has FlashAttention (compute capability 8.0 and newer)."""
    peft_type: str | None = None
    peft_task: str = ""
    """The task that peft gets; empty where an adapter config names none."""
    config: MethodConfig | None = None
    seq_len: int = 2048
    batch_size: int = 1
    dtype: str = "bf16"
    """What the model is loaded in, and a quantized weight dequantized to."""
    adapter_on_host: bool = False
    """Whether buffers that peft makes on the host stay there."""
    adapter_buffers: str = "fp32"
    """The dtype of buffers that peft makes in the adapter's, which a trainer's cast of what trains does not reach."""
    adapter_shards: str | None = None
    """The dtype that peft finds of an adapter's weights where they are gathered in another one after it has looked: FSDP1's."""
    masks_unpadded: bool = False
    """Whether sdpa gets a mask of each sequence although nothing is hidden."""
    flattens: bool = False
    """Whether flash-attn gets documents of one row, told apart by their positions, as tensors that lie token by token."""
    repeats_kv: bool = False
    """Whether grouped keys and values are repeated before the kernel sees them."""
    merged_4bit: bool = False
    """Whether an adapter was merged into 4-bit weights and taken out again: a sum in fp32 was quantized, and backward dequantizes
    into fp32 (peft, tuners/lora/bnb.py, `Linear4bit.merge`)."""
    keeps_4bit_inputs: bool = False
    """Whether a product with a 4-bit weight keeps its input."""
    rotary_by_product: bool = False
    """Whether cuBLAS makes angles of positions, and so takes its workspace before the first layer."""
    shifts_logits: bool = False
    """Whether the loss copies the logits without the last position."""
    freezes_ranknum: bool = False
    """Whether AdaLoRA's `ranknum` trains on no base."""
    loss_of_16_bits: bool = False
    """Whether the loss copies them so and reads the copy in their own dtype."""
    masks_logits: bool = False
    """Whether the class makes logits fp32, and its loss copies those of tokens that the mask shows."""
    logits_in_fp32: bool = False
    """Whether logits are fp32 before any loss."""
    loss: str = "full"
    of_completions: bool = False
    """Whether the loss is that of Unsloth's GRPO."""
    holds_hidden_states: bool = False
    """Whether the input of every layer stays on the card until the model returns, as for Unsloth's GRPO."""
    returns_hidden_states: bool = False
    """Whether the outputs hold the input of every layer and the last hidden states."""
    scored_rows: int = 0
    """How many times a batch's rows a forward without gradients reads before the step, in Unsloth's GRPO; 0 where there is none.
    Behind it the last layer's input goes to the host too."""
    kept_caches: int = 0
    """How many times a batch's rows the cache has that lasts from generation on; 0 where there is none."""
    loss_facts: tuple[Fact, ...] = ()
    """The facts of the batch that decide which operations the loss runs (`LossSizes.facts`)."""
    token_outputs: tuple[str, ...] = ()
    """What the chunked head gives for each token besides its log-probability."""
    shows_picture: bool = False
    """Whether a frozen tower is shown a small picture before the layers run (`Trainer.shows_picture`)."""
    embeds_rows: bool = False
    """Whether embeddings of texts that share one row are made of the hidden states, in place of logits."""
    passages: int = 0
    """Passages of each query that a recipe for retrieval reads; 0: none."""
    reads_answer: bool = False
    """Whether a row whose answer is given is read beside completions, as CHORD does."""
    scores_words: WordScores | None = None
    """Of which texts two words are scored at the end (`Trainer.scores_words`)."""
    parts_of_row: int = 1
    """How many ranks' parts of the row are put together before that."""
    without_loss: bool = False
    """Whether the model returns logits alone."""
    logits_to_keep: int | None = None
    """How many of each sequence's last tokens the head reads; None for all."""
    router_loss: bool = False
    """Whether the loss of a mixture's load is added to that of the model."""
    reentrant: bool = False
    """Whether checkpointing is reentrant."""
    checkpoints_forward: bool = True
    """Whether it covers the forward of a layer, and not the hooks around it."""
    checkpoints_parts: bool = False
    """Whether norms, attention and MLP of a layer are checkpoints within it."""
    every_n_layers: int = 1
    """Which layers checkpointing reaches: those whose number it divides."""
    published_code: bool = False
    """Whether the code beside the weights runs, and not that of transformers."""
    own_modules: bool = False
    """Whether the trainer builds the model of modules of its own."""
    own_decoders: bool = False
    """Whether the trainer builds models of some types of modules of its own."""
    hooks_inputs: bool = True
    """Whether under checkpointing the embeddings are made to require gradients."""
    noisy_embeddings: bool = False
    mtp_depths: int = 0
    """Further tokens that each position predicts."""
    """Whether a hook adds noise to the embeddings, which may be a leaf by then (transformers, integrations/neftune.py)."""
    checkpoints_frozen: bool = True
    """Whether checkpoints cover layers in which nothing trains."""
    hooks_adapted: bool = False
    """Whether those of a model with an adapter are without checkpointing too."""
    kernels: Kernels = NO_KERNELS
    """The kernels of other packages that replace the model's own."""
    rows_of_experts: Rows = "many"
    """How many rows experts with biases get: `few` get their biases at once, `most` run chunk by chunk, each a checkpoint."""
    chip: "Chip | None" = None
    """The card by which bitsandbytes chooses how it multiplies 4-bit weights; None where it dequantizes them all."""
    fuses_first: bool = False
    """Whether the first product of this batch is fused: the first one that is not then takes cuBLAS's workspace."""
    splits_keys: bool = False
    """Whether torch's FlashAttention may split the keys of this batch."""
    rotary_rows: Dim = 0
    """Rows of the rotary tables that such a package keeps."""
    hosted: bool = False
    """Whether the inputs of checkpointed layers wait on the host."""
    older_liger: bool = False
    """Whether Liger's loss is that of release 0.8.1 (`memory.liger_loss`)."""
    scan: str = ""
    """The release of transformers whose scan of Mamba 2 runs; empty: that of the records."""
    recorded: Recorded | None = None
    """What a layer allocates that torch compiles whole."""
    ring: "Ring | None" = None
    """The ranks that share each row of tokens, and this one's place among them; None: each rank has whole rows."""
    ulysses: int = 1
    """Ranks that share each row of tokens by DeepSpeed's Ulysses: in attention each has whole rows of a part of the heads."""
    worst_routing: bool = False
    """Whether this rank's experts get every token of all ranks that divide them."""
    tunes: bool = False
    """Whether torch times the kernels of such layers, as it does in the first step."""

    def config_as(self, kind: type[Config]) -> Config:
        """The method's config, in the class of the method that asks."""
        assert isinstance(self.config, kind)
        return self.config

    @property
    def takes_texts_apart(self) -> bool:
        """Whether a hook behind the layers hands on other hidden states than they gave."""
        return self.parts_of_row > 1 or self.scores_words == "texts of a row"

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch_size * self.seq_len

    @property
    def scores_first(self) -> bool:
        """Whether a reference reads in the first pass too: its first layer counts as the last (unsloth_zoo,
        gradient_checkpointing.py, `LAST_GC_INDEX`)."""
        return bool(self.scored_rows) or self.returns_hidden_states


class Part:
    """One module of one layer: its parameters by name, and the kind of class it is."""

    __slots__ = ("bias", "kind", "layer", "name", "params", "quant", "weight")

    def __init__(
        self, name: str, kind: str, params: dict[str, Parameter], quant: QuantConfig | None, layer: int | None = None
    ) -> None:
        self.name = name
        self.layer = layer
        self.kind = kind
        self.params = params
        self.quant = quant
        self.weight = params.get("weight")
        self.bias = params.get("bias")

    @property
    def own_weight(self) -> Parameter:
        """The weight of a module that has one."""
        assert self.weight is not None, self.name
        return self.weight


TOKEN_ADAPTER = ".token_adapter"
SAVED = ".modules_to_save"
"""Where a module's trainable copy is, below it."""

Adapter = Callable[[Tape, Part, Tensor, Callable[[Tensor], Tensor], Running], Tensor]
