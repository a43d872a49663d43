"""The blocks of an architecture: attention, MLP, state-space layers and the delta rule, and which layers have them."""

from typing import Literal, NamedTuple


class Attention(NamedTuple):
    """One attention module of a block. `num_key_value_heads` < `num_attention_heads` is GQA; 1 is MQA.

    `value_head_dim`: the head width of values if narrower than that of keys (MLA).
    `relative`: DeBERTa's kinds of position scores; `bucketed`: far positions share a bucket, by the logarithm of their distance.
    `softcap`: whether scores pass through a scaled tanh; `clipped`: whether q, k and v are clamped.
    `rotary_dim`: how many numbers of a head are rotated; None for all.
    `interleaved`: rotary pairs are adjacent numbers (MLA), not halves of a head.
    `alibi_length`: the number of positions for which MPT builds its bias.
    `cached_heads`: heads in the KV cache if keys are repeated before they are cached (Falcon); None for the key/value heads.
    `scaled_queries`: rotated queries are multiplied by a factor of their position.
    `keys_as_values`: values are the projected keys, normed in another way. `stores`: its keys and values live until the model's
    forward ends, for layers that `borrow` them: these have none of their own.
    `sees_blocks`: the tokens of a picture see each other; the class beside towers makes a mask of it whether there are pictures
    or not. `num_chosen_keys`: how many keys an indexer chooses for each query (DeepSeek's sparse attention); None: it has none.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    variant: Literal["standard", "mla"] = "standard"
    value_head_dim: int | None = None
    positions: Literal["rotary", "learned", "alibi", "relative", "disentangled", "none"] = "rotary"
    window: int | None = None
    qk_norm: bool = False
    fused_qkv: bool = False
    causal: bool = True
    cross: bool = False
    sinks: bool = False
    relative: tuple[str, ...] = ()
    bucketed: bool = False
    softcap: bool = False
    clipped: bool = False
    rotary_dim: int | None = None
    alibi_length: int | None = None
    interleaved: bool = False
    cached_heads: int | None = None
    scaled_queries: bool = False
    keys_as_values: bool = False
    stores: bool = False
    borrows: bool = False
    sees_blocks: bool = False
    num_chosen_keys: int | None = None


class Router(NamedTuple):
    """How a mixture of experts routes tokens.

    `norm_topk_prob`: the weights of the chosen experts are normalized to sum to one.
    `groups`, `chosen`: experts are in so many groups (0: none), of which some are chosen first.
    `noise`: the input gets noise in training. `hands_out`: the config asks for its logits, and with them for the
    load-balancing loss. `coefficient`: of that loss; None: the class has none.
    """

    norm_topk_prob: bool = False
    groups: int = 0
    chosen: int = 0
    noise: bool = False
    hands_out: bool = False
    coefficient: float | None = None


class Mlp(NamedTuple):
    """The feed-forward part of a block: plain (two matrices), gated (three), or a mixture of gated experts.

    `apart`: each expert is linear layers of its own; they run one after the other.
    """

    variant: Literal["plain", "gated", "moe"]
    intermediate_size: int
    activation: str
    fused_gate_up: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    shared_intermediate_size: int = 0
    router: Router = Router()
    apart: bool = False


class StateSpace(NamedTuple):
    """A Mamba 2 mixer: heads that share inputs and outputs of their states by groups, computed in chunks of the sequence."""

    num_heads: int
    head_dim: int
    groups: int
    state_size: int
    chunk_size: int

    @property
    def width(self) -> int:
        """Numbers of all heads."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: of the heads, and of the inputs and outputs of states."""
        return self.width + 2 * self.groups * self.state_size


class DeltaRule(NamedTuple):
    """A gated delta rule: heads of keys that serve as many heads of values or more, behind a convolution over `taps` tokens."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def width(self) -> int:
        """Numbers of all heads of values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: of queries, keys and values."""
        return self.width + 2 * self.key_heads * self.key_dim


class Block(NamedTuple):
    """Identical layers of one stack: the facts that activations depend on, besides the weights.

    `attentions`: those of each layer; none where a convolution or something else stands in their place.
    `state_space`: the mixer of a layer that has no other part. `delta_rule`: what stands in the place of attention.
    `parallel`: attention and MLP both read the layer's input, and their outputs are added.
    `shared_norm`: both read it through one norm. `convolution`: the activation of the one beside the first layer (DeBERTa v2).
    """

    stack: Literal["decoder", "encoder"]
    layers: tuple[int, ...]
    attentions: tuple[Attention, ...]
    mlp: Mlp
    norm: Literal["rmsnorm", "layernorm"]
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    parallel: bool = False
    shared_norm: bool = False
    convolution: str = ""
    state_space: StateSpace | None = None
    delta_rule: DeltaRule | None = None
