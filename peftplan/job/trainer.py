"""What a trainer does around a model's step, as a record of facts."""

from typing import Literal, NamedTuple

from peftplan.distributed.layout import ACCELERATE, Layout
from peftplan.job.trainer_words import Autocast, DeviceMap, Loss, Passages, Reference, Scoring, TrainerName, WordScores

TABLES = ("embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings")
"""Parts of names of embeddings and heads that axolotl casts (loaders/utils.py:306, `get_linear_embedding_layers`)."""
NARROWED = ("lm_head", "embed_tokens", "wte", "wpe")
"""Parts of names of what earlier releases of trl cast to bf16 (0.11.4, trainer/utils.py:861, `peft_module_casting_to_bf16`)."""


class Defaults(NamedTuple):
    """Values that a trainer sets unless the user does, by the names of the setup's options."""

    autocast: Autocast = "bf16"
    gradient_checkpointing: bool = True
    optim: str = "adamw_torch_fused"
    loss: Loss = "full"
    keep_outputs: bool = False
    use_cache: bool | None = False
    """None: as the model's config says."""
    kbit_prepare: bool = True
    device_map: DeviceMap = "none"
    """Of a model that the trainer or its program loads by name, on one GPU."""


class Forward(NamedTuple):
    """A forward of a step: of the policy, which trains, or of the reference model, which does not."""

    of: Literal["policy", "reference"]
    trains: bool = False
    """Whether its graph is kept for backward; else it runs under `no_grad`, and leaves a sum for each row."""
    batch: str = ""
    """The prefix of the batch's tensors that it reads. What a forward of such rows gives is dropped but for a sum of each row."""


LOSS = (Forward("policy", trains=True),)
"""A step that runs the model once, with its loss."""


class Trainer(NamedTuple):
    """A trainer's defaults, and what it does that no option changes. Facts that are not set are those of transformers' Trainer
    under accelerate (`Trainer.training_step`, `Trainer.create_optimizer`).
    """

    name: TrainerName
    called: str
    """Its name in error messages."""
    defaults: Defaults = Defaults()
    drops_outputs: bool = True
    """Whether the loss is computed in a function of its own, which drops the model's outputs before backward."""
    holds_outputs: bool = False
    """Whether the loop holds the outputs until backward has ended, where it computes the loss apart."""
    prepares_model: bool = True
    """Whether accelerate prepares the model: autocast returns fp32 copies of 16-bit outputs, and the loss of fp16 is scaled."""
    clips_gradients: bool = True
    makes_optimizer: bool = True
    """Whether `Trainer.create_optimizer` makes the optimizer: its 8-bit optimizers keep embeddings in 32 bits."""
    updates_ranks: bool = False
    """Whether it calls AdaLoRA's `update_and_allocate` after each step of the optimizer."""
    collates: bool = True
    """Whether a collator makes the batches: transformers then makes no mask of its own (`Script.masks_unpadded`)."""
    collects_batches: bool = True
    """Whether the batches of a step's micro batches are all on the device before it begins (`Trainer.get_batch_samples`)."""
    balances_experts: bool = False
    """Whether it asks a mixture for its load-balancing loss, whatever `output_router_logits` says, unless its coefficient
    is 0 (trl, `aux_loss_enabled` in each constructor)."""
    always_masks: bool = False
    """Whether every batch has an attention mask, of ones where nothing is padded."""
    packs: bool = False
    """Whether a row is documents one behind another, without padding, whose positions tell them apart: sdpa gets a mask of them
    (transformers, masking_utils.py, `find_packed_sequence_indices`)."""
    loads_on_device: bool = False
    """Whether the model is on its device before the adapter is made; Trainer moves both, unless the model is quantized."""
    loads_in_fp32: bool = False
    """Whether a model that is given by its name is loaded in fp32, whatever its config says."""
    full_in_fp32: bool = False
    """Whether a model that trains in full is cast to fp32, whatever dtype it was loaded in."""
    turns_cache_off: bool = False
    """Whether the forward is called without a KV cache, whatever `use_cache` says."""
    casts: tuple[str, ...] = ()
    """Formats of the base on which all that trains is cast to bf16, DoRA's magnitudes excepted."""
    losses: tuple[Loss, ...] | None = None
    """The losses that it can compute; None: any."""
    narrow_under_zero3: bool = False
    """Whether under ZeRO-3 an adapter stays in the dtype of a base in 16 bits (trl, `autocast_adapter_dtype` in each
    constructor)."""
    reentrant_under_zero3: bool = False
    """Whether it asks for reentrant checkpoints of an adapted model under ZeRO-3 (trl, sft_trainer.py:895). It writes into
    `gradient_checkpointing_kwargs`, which Trainer reads if that is one dict with `activation_checkpointing_kwargs`: where the
    config states one of them, and in releases that have one field (`versions.FORWARD_CHECKPOINTED`)."""
    sums_tokens: bool = False
    """Whether it makes the chunked loss itself, from the log-probabilities of the tokens that the forward returns."""
    rows: int = 1
    """Rows of the batch for each example of `batch_size`: 2 where it is a pair of completions."""
    forwards: tuple[Forward, ...] = LOSS
    """The forwards of a step, in order; what those before it gave is alive while one runs."""
    token_outputs: tuple[str, ...] = ("entropy", "is_top1")
    """What the chunked head gives for each token besides its log-probability (`add_fused_lm_head`)."""
    sums_rows: bool = False
    """Whether its loss is made of the log-probabilities of whole rows, summed from those of their tokens."""
    scoring: Scoring | None = None
    """How its loss is made of all logits, which the model returns without a loss; None: it never holds them, or the model makes
    the loss."""
    completions_alone: bool = False
    """Whether the model makes logits of completions alone, and of the token before them (its `logits_to_keep`)."""
    loss_apart: bool = False
    """Whether the model returns logits alone, of which the loop makes the cross entropy when the model has returned."""
    weighs_tokens: bool = False
    """Whether it makes the cross entropy of each token once more, of the logits, and drops the model's own with the outputs."""
    teaches: bool = False
    """Whether it compares the distributions of a teacher and of its student."""
    adds_own_loss: bool = False
    """Whether it adds the loss that the student makes of labels."""
    anchors: bool = False
    """Whether its loss compares all logits with those of a reference model, beside one that the model makes and it drops."""
    resizes_teacher: bool = False
    """Whether the teacher's embeddings and head get as many rows as the student's have; else their vocabularies are one."""
    freezes_teacher: bool = False
    """Whether no parameter of the teacher requires gradients, and it keeps no KV cache; else it is as `from_pretrained` leaves
    it."""
    compares_at_once: int | None = None
    """Of scored tokens, how many distributions it compares at a time; None: those of all positions."""
    scores_values: bool = False
    """Whether its loss is made of a score of each row, which a value head over the last hidden states gives beside the logits
    (trl as LLaMA-Factory pins it, models/modeling_value_head.py)."""
    embeds: bool = False
    """Whether its loss is made of embeddings of pairs of texts, each column of which is a forward of the bare model."""
    embeds_rows: bool = False
    """Whether it is made of embeddings of texts that share one row."""
    passages: Passages | None = None
    """How it reads the passages of a query: in a forward of their own behind that of the queries, or each in a row with its
    query; None: its data have none."""
    n_passages: int | None = None
    """How many a query has by default."""
    scores_words: WordScores | None = None
    """Of which texts it scores two words at the end, in place of all logits: each a row, or all those of one row."""
    skips_autocast: bool = False
    """Whether on one GPU it calls the model's parts past the forward that accelerate wraps (trl `_ForwardRedirection`)."""
    writes_under_autocast: bool = False
    """Whether the model that writes completions is the one that accelerate wraps."""
    writes_without_cache: bool = False
    """Whether it keeps no KV cache while it writes them, if layers are recomputed."""
    patches_layers: bool = False
    """Whether it was rehearsed with Liger's kernels of layers, which replace the policy's modules alone."""
    rewards: bool = False
    """Whether a reward model is on the card, which scores completions."""
    mixes: bool = False
    """Whether policy and reference write completions together, of a mixture of their logits (trl,
    experimental/nash_md/nash_md_trainer.py, `GeometricMixtureWrapper`)."""
    values: bool = False
    """Whether a value model, of the reward model's weights, trains beside the policy, and both keep all that they compute: the
    trainer makes no checkpoints (trl, experimental/ppo/ppo_trainer.py)."""
    sends_at_once: bool = False
    """Whether before vLLM writes completions all weights are gathered at once where ranks share them, and a server gets them in
    flat copies; else one by one."""
    taught: bool = False
    """Whether a teacher scores completions before a step: a third model, which ZeRO-3 divides beside a student under ZeRO-2."""
    gathers_when_called: bool = False
    """Whether under ZeRO-3 nothing is gathered ahead, whose bucket it sets to 0 (ms-swift, rlhf_trainers/arguments.py:117), nor
    kept for a later use, as three rehearsed jobs showed."""
    sends_from_host: bool = False
    """Whether weights that wait on the host, or waited there, reach vLLM in groups of layers."""
    reloads_weights: bool = False
    """Whether, beside vLLM, weights wait on the host while it generates. Under ZeRO-3 those that train come back as tensors of
    their own, beside the flat ones that the step writes them from (ms-swift 4.6.0, rlhf_trainers/rollout_mixin.py:1430, :1461;
    DeepSpeed, stage3.py, `_unflatten_partitioned_parameters`). Under ZeRO-1 all do, and the optimizer's states too, beside the
    flat weights and the first states (`job.inventory`)."""
    leaves_temperature: bool = False
    """Whether the logits of what the policy wrote are scored as they are, not divided by the temperature."""
    shows_picture: bool = False
    """Whether beside rows without a picture the tower of a vision-language model is shown a black one of 32 x 32 pixels, of whose
    features nought is added to the embedded tokens (ms-swift 4.6.0, template/base.py:2450)."""
    shares_rows: bool = False
    """Whether ranks share a row without padding, of all completions or texts; of completions each scores all its own tokens."""
    scores_entropies: bool = False
    """Whether it makes the entropy of every scored token, with gradients, which no loss reads (ms-swift 4.6.0,
    rlhf_trainers/grpo_trainer.py:939)."""
    reads_features: bool = False
    """Whether the base, without its adapter, reads all completions of a step at once, before the step: with the hidden states of
    every layer, and the logits of every token (axolotl 0.19.0, core/trainers/ebft/rewards.py:20, trainer.py:288)."""
    block: int = 0
    """Of documents behind whose anchors the policy writes blocks, all side by side: the tokens of a block, and those before an
    anchor, and between two; 0 where it writes completions."""
    wide_reference: bool = False
    """Whether the reference model is read anew in fp32, with sdpa, whatever the policy has (trl as axolotl pins it,
    trainer/utils.py, `create_model_from_path`)."""
    scores_documents: bool = False
    """Whether log-probabilities are made of the tokens of documents too, not of blocks alone."""
    wide_ends: bool = False
    """Whether norms, embedding and head of a model that trains in full stay in fp32 unless FlashAttention runs."""
    keeps_logits: tuple[str, ...] = ()
    """The models whose logits stay until the loss is made: `policy`, `reference`."""
    reference_lasts: bool = False
    """Whether the reference's logits stay until those of the next micro batch are there."""
    kinds: Literal["together", "in the log", "after its forwards"] = "together"
    """Whether and when the logits of rows are copied by their kind, chosen or rejected: all at the end for the log, or those of a
    model when its forwards have returned."""
    empties_cache: bool = False
    """Whether `torch.cuda.empty_cache()` runs after each backward."""
    empties_before: bool = False
    """Whether it runs before each backward, when the loss is made."""
    without_extra_rows: tuple[str, ...] = ()
    """Values of `loss_type` that leave out the forwards of extra rows (`Forward.batch`)."""
    without_reference: tuple[str, ...] = ()
    """Values of `loss_type` that need no reference model."""
    others_in_data: bool = False
    """Whether the data hold the rows of other completions (`Forward.batch`); else they are made of the batch, which has two or
    more."""
    reentrant: bool = False
    """Whether it makes reentrant checkpoints under DeepSpeed, and was rehearsed so (ms-swift 4.6.0, trainers/mixin.py:949)."""
    disables_dropout: bool = False
    """Whether no adapter drops activations, and no module of the model: its `disable_dropout`, which is on by default."""
    under_ddp: tuple[Reference, ...] = ()
    """Of a trainer of preferences or rewards: the references beside which it was rehearsed under DDP."""
    under_zero0: tuple[Reference, ...] = ()
    """The same under DeepSpeed's stage 0."""
    under_zero1: tuple[Reference, ...] = ()
    """The same under ZeRO-1."""
    under_zero2: tuple[Reference, ...] = ()
    """The same under ZeRO-2."""
    under_zero3: tuple[Reference, ...] = ()
    """The same under ZeRO-3."""
    under_fsdp2: tuple[Reference, ...] = ()
    """The same under FSDP2."""
    beside_copy: bool = False
    """Whether one that returns all logits was rehearsed beside a second model."""
    task: str | None = None
    """The task of the models that it trains, where it is one."""
    num_labels: int | None = None
    """Scores of its head."""
    completion: int | None = None
    """The default of `max_completion_length`, where the policy writes the completions that it is trained on."""
    beta: float | None = None
    """The default of `beta`; 0 leaves the reference model out."""
    num_generations: int | None = None
    """The default of `num_generations`, completions of a prompt, all of which one generation holds."""
    options: frozenset[str] = frozenset()
    """The options of preference and RL trainers that it has."""
    loss_types: tuple[str, ...] = ()
    """What it accepts as `loss_type`."""
    many_losses: bool = False
    """Whether it adds up losses of several types."""
    own_fsdp2: bool = False
    """Whether it replaces accelerate's `fsdp2_prepare_model`: what trains stays in the dtype in which it was loaded, and each
    matrix of an adapter is a unit of its own (axolotl 0.19.0, monkeypatch/accelerate/fsdp2.py:409, :429)."""
    pins_accelerate: bool = False
    """Whether its package refuses accelerate since `versions.FSDP2_TAIL_APART` (LLaMA-Factory 0.9.5: up to 1.11)."""
    narrows: tuple[str, ...] = ()
    """Parts of names of modules that it casts to 16 bits, those of a prepared base too, once the adapter is there."""
    casts_ends: bool = False
    """Whether it casts norms, embedding and head to 16 bits behind kbit preparation (axolotl 0.21.0, loaders/model.py:646)."""
    recasts_tables: bool = False
    """Whether it casts embedding and head to fp32, and back, while it loads a model to be adapted (`memory.recast`)."""
    other_heads: tuple[str, ...] = ()
    """Model types whose head it looks for by an earlier name (axolotl 0.19.0, loaders/utils.py:309)."""
    widens: bool = False
    """Whether it loads a model that trains in full in 16 bits, and casts each weight to fp32 on the GPU."""
    traced_on_ranks: bool = False
    """Whether it was traced over several GPUs with methods and optimizers besides LoRA and AdamW
    (tests/distributed/traced_methods.jsonl)."""
    transformers: str = ""
    """The release of transformers that its package pins, where formulas go by it (axolotl 0.19.0, pyproject.toml): Mamba 2's scan
    multiplies by broadcasting (models/falcon_h1/modeling_falcon_h1.py of that release)."""
    deepspeed: str = ""
    """The release of DeepSpeed that its package asks for, where ZeRO-3 is another one there (axolotl 0.19.0, pyproject.toml;
    llamafactory 0.9.5, requirements/deepspeed.txt)."""
    pins_liger: bool = False
    """Whether its package needs release 0.8.1 of Liger (axolotl 0.19.0, pyproject.toml)."""
    expandable_segments: bool = False
    """Whether its package or command line sets `PYTORCH_ALLOC_CONF=expandable_segments:True` (torchtune/__init__.py,
    axolotl/cli/main.py)."""
    own_modules: bool = False
    """Whether it builds the model of modules of its own, on the card."""
    hooks_inputs: bool = True
    """Whether under checkpointing the embeddings are made to require gradients (`enable_input_require_grads`)."""
    checkpoints_frozen: bool = True
    """Whether checkpoints cover layers in which nothing trains. The input of the first layer that trains is a leaf then, not the
    embeddings (llamafactory 0.9.5, model/model_utils/checkpointing.py:80)."""
    hooks_adapted: bool = False
    """Whether those of a model with an adapter are without checkpointing too (axolotl 0.19.0, loaders/adapter.py:427)."""
    own_decoders: bool = False
    """Whether it builds models of some types of modules of its own, unless it is told not to (`memory.models.automodel`)."""
    own_lora: bool = False
    """Whether LoRA is an autograd function of its own, in place of peft's layers (`memory.methods.automodel_lora`)."""
    adapters_as_base: bool = False
    """Whether adapters are in the model's dtype."""
    layout: Layout = ACCELERATE
    """How it shards a model under FSDP2."""
    search: Literal["all", "full"] | None = None
    """Where DDP looks for parameters without gradients: transformers' Trainer in any model that is not its own class, such as
    peft's, and in its own without checkpoints (trainer.py:749). `full`: in the latter alone, as LLaMA-Factory 0.9.5 with LoRA
    (hparams/parser.py:474). axolotl 0.19.0 never does unless it is told to (core/builders/causal.py:265)."""
    searches_behind_towers: bool = False
    """Whether it does so in any model that reads pictures or sound too, unless checkpoints are reentrant: rows without them leave
    the towers without gradients (trl, sft_trainer.py:772, and the constructors of DPO, KTO, GRPO and RLOO)."""
    package: str | None = None
    """The package whose other trainers are not counted."""
    arguments: str | None = None
    """The class of its arguments, where it has one of its own."""

    @property
    def casts_back(self) -> tuple[str, ...]:
        """Parts of names of modules that it casts back to 16 bits behind kbit preparation."""
        return ("norm", *TABLES) if self.casts_ends else self.narrows

    @property
    def generates(self) -> bool:
        """Whether the policy writes the completions that it is trained on."""
        return self.completion is not None

    @property
    def of_preferences(self) -> bool:
        """Whether it trains on preferences, rewards or embeddings: a step is more than a forward with its loss."""
        return bool(self.options) or self.rows > 1 or self.embeds or self.embeds_rows

    @property
    def shares_texts(self) -> bool:
        """Whether ranks share a row of texts, whose hidden states each puts together behind the layers."""
        return self.shares_rows and (self.embeds_rows or self.scores_words is not None)

    def searches(self, *, adapts: bool, checkpoints: bool, reentrant: bool, towers: bool) -> bool | None:
        """Whether DDP looks for parameters without gradients; None: torch's default."""
        if self.searches_behind_towers and towers and not reentrant:
            return True
        if self.search is None:
            return None
        return self.search == "all" if adapts else not checkpoints

    def adapter_on_host(self, *, quantized: bool) -> bool:
        """Whether buffers that peft makes on the host stay there."""
        return self.loads_on_device or quantized

    def casts_adapter(self, quant: str | None) -> bool:
        """Whether all that trains is cast to bf16 on a base of this format."""
        return quant in self.casts
