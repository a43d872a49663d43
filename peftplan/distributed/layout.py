"""How a tool shards a model under FSDP2: which modules it calls `fully_shard` on, and how a rank comes to its shards."""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed


class Layout(NamedTuple):
    """The units besides the layers, and what a rank does around them. The defaults are accelerate's."""

    ends: Literal["units", "tables", "embedding", "root"] = "units"
    """Embedding and head: `units`, the final norm with the head where accelerate finds it; `tables`, each a unit where it trains
    and is not tied; the `embedding` alone where it is not tied; or part of the `root`."""
    frees_root: bool = False
    """Whether what the root has gathered is freed after forward."""
    param_dtype: str | None = None
    """The dtype in which weights are gathered, where the tool sets it."""
    reduce_dtype: str | None = None
    """The same of gradients as they are reduced."""
    keeps_last: bool = False
    """Whether the last layer stays gathered after forward."""
    syncs_each_batch: bool = False
    """Whether gradients are reduced in every micro batch."""
    loads: Literal["modules", "tensors", "shards", "model"] = "modules"
    """What is whole on the device while shards are made: a unit (a tensor if `cpu_ram_efficient_loading`), a tensor, nothing,
    since shards are made empty and then filled, or the model, of which a unit goes when its shards are made."""
    streams: bool = False
    """Whether the tool reads a quantized model itself: no warm-up block comes first, and a unit is whole until it is sharded.
    transformers reads mixtures of experts, whose checkpoints are laid out otherwise."""
    buffers_first: bool = False
    """Whether buffers are there before the weights, and a tied embedding comes before the layers."""
    leaves_apart: bool = False
    """Whether each module of an adapter is a unit, and the layers that have one are part of the root."""
    tower_in_root: bool = False
    """Whether a frozen tower beside the text part belongs to the root, which gathers it whole."""

    def of_tool(self, distributed: "Distributed") -> "Distributed":
        """The strategy with the dtypes that the tool sets where the user sets none."""
        dtypes = {"param_dtype": self.param_dtype, "reduce_dtype": self.reduce_dtype}
        unset = {name: dtype for name, dtype in dtypes.items() if dtype is not None and getattr(distributed, name) is None}
        return distributed.model_copy(update=unset) if unset else distributed


ACCELERATE = Layout()
"""accelerate, utils/fsdp_utils.py (`fsdp2_prepare_model`, `fsdp2_load_full_state_dict`)."""
TORCHTUNE = Layout(
    ends="root",
    syncs_each_batch=True,
    loads="tensors",
    buffers_first=True,
)
"""torchtune at bd2a0fc7, training/_distributed.py (`shard_model`, `load_from_full_model_state_dict`); 0.6.1 frees the root."""
AUTOMODEL = Layout(
    ends="tables",
    param_dtype="bf16",
    reduce_dtype="fp32",
    keeps_last=True,
    loads="shards",
    streams=True,
    tower_in_root=True,
)
"""nemo_automodel 0.7.0, components/distributed/parallelizer.py (`apply_fsdp2_sharding_recursively`, `frozen_multimodal_sharding`,
`_fully_shard_untied_input_output_embeddings`), components/checkpoint/checkpointing.py (`initialize_model_weights`),
_transformers/model_init.py (`_stream_load_bnb_weights`)."""
OF_ENCODERS = AUTOMODEL._replace(ends="root", loads="modules")
"""Its wrapper of an encoder, which names no embedding and is made on the host (_transformers/retrieval.py)."""
AXOLOTL = Layout(ends="root", frees_root=True)
"""axolotl 0.19.0, monkeypatch/accelerate/fsdp2.py (`fsdp2_prepare_model`), in place of accelerate's, as which it loads."""
LLAMA_FACTORY_V1 = Layout(
    ends="embedding",
    frees_root=True,
    param_dtype="bf16",
    reduce_dtype="fp32",
    syncs_each_batch=True,
    loads="model",
    leaves_apart=True,
)
"""llamafactory 0.9.5, v1/plugins/trainer_plugins/distributed/fsdp2.py (`FSDP2Engine`), v1/core/model_engine.py."""
