"""What a trainer keeps while its policy generates completions with transformers: a prompt's forward, then the KV cache; or while
it sends its weights to vLLM, which generates them.

b completions that are written at once, s tokens of a prompt, t tokens of the full cache, v vocabulary.

    prompt      the forward without gradients, with logits of the last token; without autocast, except in DistillationTrainer
    decoding    the full cache, a layer's keys once more while they grow, in fp32 what its attention takes, logits and
                probabilities of a token

Where tools answer, the policy goes on after what it wrote and the answers, which stay within the longest completion together: a
later turn begins with up to s + c tokens, c those of a completion, and writes up to c more, before what is too long is cut.

Where Unsloth trains all weights, the cache is whole from the prompt on.

OnlineDPOTrainer keeps no cache where layers are recomputed: each token is the forward of all before it.

Source: trl `GRPOTrainer._generate_single_turn` (`unwrap_model_for_generation`, which gives the model that accelerate did not
wrap) and `_tool_call_loop`; transformers, generation/utils.py (`_sample`, without top-k and top-p). Left out: the cache grows
token by token, and the allocator keeps what it outgrows; turns between the first and the longest.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from peftplan.analytic.compile_job import Compiled
from peftplan.analytic.rollout import mixed, rolled_out
from peftplan.analytic.running import running_of
from peftplan.analytic.scoring import scored
from peftplan.analytic.sending import gathered_whole, sent
from peftplan.analytic.sizes import sizes
from peftplan.arch.modules import Architecture
from peftplan.deployment.kv_cache import CacheTensor, kv_cache
from peftplan.job.inventory import Inventory
from peftplan.job.loss_sizes import LossSizes
from peftplan.job.requirements import rows_at_once
from peftplan.ledger import Ledger
from peftplan.memory.methods import adapter_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.timeline import Timeline, timeline
from peftplan.memory.waves import waves_of
from peftplan.parameters import Parameters
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor

GENERATE = "generate"
MOST_READ = 2048
"""Tokens of a completion with its prompt above which they are cut (axolotl 0.19.0, core/trainers/ebft/trainer.py:217)."""
PARTS = 4
"""Of a completion that is written without a cache: forwards of five lengths stand for all. With 8 or 16 parts two of three
rehearsed jobs reserve as many bytes, and one -0.45 instead of -0.23 % of its rehearsal."""
KEPT = 8
"""The last generations, each with the job that it is of."""


class Generation(NamedTuple):
    """The events of writing the completions of one batch, and the sizes at which they are evaluated."""

    timeline: Timeline
    sizes: Mapping[str, int]
    phase: str = GENERATE

    @property
    def peak(self) -> tuple[int, int]:
        """Bytes beside what lasts, and how many events lead to them."""
        return self.timeline.peaks(self.sizes)[self.phase]

    @property
    def lines(self) -> Ledger:
        """What is alive then."""
        return Ledger(self.timeline.lines(self.peak[1], self.sizes))


SAMPLED = 8
"""Completions that PPOTrainer shows after its first step, by default (trl, `num_sample_generations`,
`per_device_eval_batch_size`)."""
_GENERATIONS: OrderedDict[tuple[object, ...], tuple[Compiled, tuple[Generation, ...]]] = OrderedDict()


def generations_of(inventory: Inventory, compiled: Compiled, *, compute_capability: str) -> tuple[Generation, ...]:
    """What comes before a job's step: its generation, and what reads it; none where the policy writes nothing, or vLLM writes for
    it and gets one weight after another."""
    setup = inventory.job.setup
    if not setup.by.generates or setup.by.block:  # blocks are written within the step
        return ()
    key = (
        id(compiled),
        setup.generation_rows,
        setup.prompt_len,
        setup.seq_len,
        setup.tool_turns,
        setup.rollout_batch_size,
        compute_capability,
    )
    if key not in _GENERATIONS:
        inventory = _in_16_bits(inventory)
        before = [] if setup.use_vllm else _written(inventory, compute_capability)
        if setup.by.mixes:
            before.append(ending(mixed(inventory), {}))
        if setup.by.values:
            before += [ending(*each) for each in rolled_out(inventory, compute_capability)]
            before += _written(inventory, compute_capability, rows=SAMPLED)
        if setup.scored_rows:
            before.append(ending(*scored(inventory, compute_capability)))
        if setup.by.taught:
            before.append(_taught(inventory))
        if setup.use_vllm and setup.by.sends_at_once:
            before.append(ending(sent(inventory), {}))
        if setup.by.reads_features:
            before.append(_features(inventory, compute_capability))
        _GENERATIONS[key] = compiled, tuple(before)
        if len(_GENERATIONS) > KEPT:
            _GENERATIONS.popitem(last=False)
    return _GENERATIONS[key][1]


def _in_16_bits(inventory: Inventory) -> Inventory:
    """The job as a rank of DeepSpeed computes it, which has cast the weights."""
    job = inventory.job
    by_deepspeed, autocast = job.distributed is not None and job.distributed.strategy.startswith("zero"), job.setup.autocast
    if not by_deepspeed or autocast in ("none", job.setup.dtype):
        return inventory
    from peftplan.analytic.ranks import parameters_on_rank

    cast, setup = parameters_on_rank(inventory), job.setup.model_copy(update={"dtype": autocast, "autocast": "none"})
    return inventory._replace(job=job._replace(setup=setup), parameters=cast)


def _casts(f: Tape, parameters: Parameters, autocast: str) -> Tensor:
    """Autocast's casts of weights that require gradients, which it keeps until a token's forward ends."""
    cast = (p for p in parameters.all if p.trainable and p.dtype == "fp32" and len(p.shape) > 1)
    return f.new((sum(p.numel * p.copies for p in cast),), autocast, "casts of weights")


def _attended(f: Tape, arch: Architecture, keys: CacheTensor) -> None:
    """What a token's attention takes in torch's math kernel, which alone computes groups of heads in fp32: keys and values of
    each query head, and those keys scaled (`memory.math_attention`)."""
    grouped = (a for block in arch.blocks for a in block.attentions if a.num_attention_heads > a.num_key_value_heads)
    heads = next((a.num_attention_heads for a in grouped if a.num_key_value_heads == keys.shape[1]), None)
    if heads is not None:
        names = ("keys repeated", "values repeated", "keys scaled")
        repeated = [f.new(("b", heads, *keys.shape[2:]), keys.dtype, name) for name in names]
        del repeated


def _cached(f: Tape, cache: Iterable[CacheTensor], autocast: str | None) -> list[Tensor]:
    """The full cache."""
    name = "KV cache, {} of {} attention"
    return [f.many(("b", *c.shape[1:]), _cached_dtype(c, autocast), name.format(c.part, c.kind), c.layers) for c in cache]


def _cached_dtype(tensor: CacheTensor, autocast: str | None) -> str:
    """Rotated keys are in the dtype of the hidden states; values are as autocast's product makes them."""
    return autocast if autocast and tensor.part == "values" else tensor.dtype


def _taught(inventory: Inventory) -> Generation:
    """An upper bound of a teacher's forward over the completions of a micro batch: what ZeRO-3 gathers at most, the logits, which
    are divided in place, and the log-probabilities of one row.

    Source: ms-swift 4.6.0, rlhf_trainers/grpo_trainer.py (`_compute_teacher_logps`).
    """
    from peftplan.job.teacher import most_gathered, scoring_teacher_of

    setup = inventory.job.setup
    teacher = scoring_teacher_of(inventory.job)
    assert teacher is not None
    vocab, scored, dtype = teacher.architecture.vocab_size or 0, (setup.max_completion_length or 0) + 1, setup.dtype
    f = Tape()
    f.mark("forward")
    table, matrix, matrices = most_gathered(teacher)
    weights = [
        f.new((table,), dtype, "teacher's table gathered"),
        f.many((matrix,), dtype, "teacher's layers gathered", matrices),
    ]
    logits = f.new((setup.rows, scored, vocab), dtype, "teacher's logits")
    of_row = f.new((scored, vocab), dtype, "log_softmax")
    del weights, logits, of_row
    f.mark("backward")
    return ending(timeline(f, {}, vocab=None), {})


def _written(inventory: Inventory, compute_capability: str, *, rows: int | None = None) -> list[Generation]:
    """The prompt's forward with the cache after it, of the first and of the longest turn; without a cache the forwards of five
    tokens, from the first to the last. `rows`: completions that are no step's."""
    setup = inventory.job.setup
    first, more = setup.prompt_len, setup.seq_len - 1 - setup.prompt_len  # the last token is not fed
    if not (setup.by.writes_without_cache and setup.gradient_checkpointing):
        turns = (first, setup.seq_len) if setup.tool_turns else (first,)
        return [_forwarded(inventory, compute_capability, turn, cached=turn + more, rows=rows) for turn in turns]
    lengths = sorted({first + more * part // PARTS for part in range(PARTS + 1)})
    return [_forwarded(inventory, compute_capability, length, cached=0) for length in lengths]


def _forwarded(inventory: Inventory, compute_capability: str, prompt: int, *, cached: int, rows: int | None = None) -> Generation:
    """`cached`: the positions of the full cache. `rows`: completions, those of a step by default."""
    job, parameters, *_ = inventory
    setup, arch = job.setup, job.architecture
    of_step, rows = rows is None, setup.generation_rows if rows is None else rows
    rows = rows_at_once(setup) if setup.by.values and of_step else rows
    running = running_of(job, compute_capability)._replace(
        checkpointing=False, use_cache=cached > 0, loss="full", loss_facts=(), batch_size=rows, seq_len=prompt
    )
    adapter = adapter_of(job.method and job.method.peft_type)
    of_peft = job.method is None or job.method.peft_type is not None  # whose `generate` calls the model inside
    wrapped = setup.by.writes_under_autocast and not (of_peft and setup.by.rewards)
    autocast = setup.autocast if wrapped and setup.autocast != "none" else None
    running = running._replace(autocast=autocast, holds_hidden_states=False, returns_hidden_states=False, of_completions=False)
    kept = parameters if autocast else parameters._replace(all=tuple(p._replace(trainable=False) for p in parameters.all))
    model = Model(Tape(autocast=autocast), arch, kept, job.adaptation, running, job.quant, adapter=adapter)
    f = model.tape
    functions = running.recorded is not None and job.method_name == "full"
    whole = functions or running.kept_caches > 0  # from the first token on
    cache = kv_cache(arch, batch_size=rows, context=cached, encoder_context=0, dtype=setup.dtype) if cached else ()
    f.mark("forward")
    gathered = gathered_whole(f, inventory)
    with f.no_grad():
        for name in ("input_ids", "attention_mask"):
            model.batch[name] = f.new(("b", "s"), "int64", name)
        grown = [] if functions or not whole else _cached(f, cache, autocast)
        hidden = _prompt(inventory, model, cache)
        assert arch.output_embedding is not None
        logits = model.linear(arch.output_embedding, sliced(f, hidden, ("b", 1, hidden.dims[-1])))
        f.module = ""
        scores = [f.new(("b", arch.vocab_size or 0), "fp32", name) for name in ("scores", "softmax")]
        del hidden, logits
        f.end_autocast()
        f.mark("backward")
        model.kept.clear()
        grown += [_casts(f, parameters, autocast)] if autocast and cached else []
        if functions or not whole:
            grown += _cached(f, cache, autocast)
        largest = max(cache, key=lambda tensor: tensor.num_bytes // tensor.layers, default=None)
        if largest is not None and running.attention == "sdpa" and (autocast or setup.dtype) == "fp32":
            _attended(f, arch, largest)
        if functions and largest is not None:
            of_queries: Dims = ("b", arch.blocks[0].attentions[0].num_attention_heads, *largest.shape[2:])
            repeated = [f.new(of_queries, largest.dtype, name) for name in ("keys repeated", "values repeated")]
            del repeated
        growing = None if largest is None or whole else f.new(("b", *largest.shape[1:]), largest.dtype, "cat")
        del growing
        logits = f.new(("b", 1, arch.vocab_size or 0), setup.dtype, "linear")
        scores.append(f.new(("b", arch.vocab_size or 0), "fp32", "scores"))
        del logits
        if setup.by.values:  # the scores of all tokens, stacked beside those of the rollout before
            drawn, vocab = setup.max_completion_length or 0, arch.vocab_size or 0
            others = 2 * setup.generation_rows - rows if of_step else setup.generation_rows
            scores.clear()
            scores += [f.many(("b", vocab), "fp32", "scores", 2 * drawn)]
            scores += [f.many((others, vocab), "fp32", "logits of both rollouts", drawn)]
        scores.clear()
        del grown
        model.batch.clear()
    gathered.clear()
    of_prompt = timeline(f, model.stacks, vocab=arch.vocab_size)
    loss = LossSizes("full", 0, 0, 0, prompted=False)
    return ending(of_prompt, of_prompt.with_derived(sizes(rows, prompt, virtual_tokens=model.virtual_tokens, loss=loss)))


def _prompt(inventory: Inventory, model: Model, cache: Iterable[CacheTensor]) -> Tensor:
    """The hidden states of the prompts."""
    job, arch = inventory.job, model.arch
    if model.running.recorded is None:
        return forward_of(arch.model_type)(model)
    from peftplan.analytic.prompts import prompt_in_functions, prompt_in_parts

    if job.method_name == "full":
        return prompt_in_functions(model, cache, (job.setup.rows, job.setup.seq_len))
    in_parts = arch.model_type == "gpt_oss"
    return prompt_in_parts(model, cache) if in_parts else forward_of(arch.model_type, compiled=True)(model)


FEATURES = 3
"""Layers whose hidden states a reward compares, by default at a quarter, half and three quarters of the depth."""


def _features(inventory: Inventory, compute_capability: str) -> Generation:
    """The base without its adapter reads all completions: the hidden states of every layer and the logits of every token are
    alive while those of the layers that the reward compares are put together, twice.

    Left out: the same of the data's own completions, one for each prompt.
    Source: axolotl 0.19.0, core/trainers/ebft/rewards.py (`extract_hidden_states`), trainer.py:288; it keeps no KV cache.
    """
    job, parameters, *_ = inventory
    setup, arch = job.setup, job.architecture
    rows, tokens, hidden_size = setup.generation_rows, min(setup.seq_len, MOST_READ), arch.hidden_size or 0
    layers = sum(len(block.layers) for block in arch.blocks)
    running = running_of(job, compute_capability)._replace(
        peft_type=None, config=None, checkpointing=False, use_cache=False, autocast=None
    )
    running = running._replace(loss="full", loss_facts=(), batch_size=rows, seq_len=tokens)
    frozen = parameters._replace(all=tuple(p._replace(trainable=False) for p in parameters.all if p.owner == "base"))
    model = Model(Tape(), arch, frozen, job.adaptation, running, job.quant)
    f = model.tape
    f.mark("forward")
    with f.no_grad():
        for name in ("input_ids", "attention_mask"):
            model.batch[name] = f.new(("b", "s"), "int64", name)
        written = f.many(("b", "s"), "int64", "prompts and completions, apart and together", 4)
        states = f.many(("b", "s", hidden_size), setup.dtype, "hidden states of layers", layers - 1)
        last = forward_of(arch.model_type)(model)
        embedded = f.new(("b", "s", hidden_size), setup.dtype, "embedding")
        assert arch.output_embedding is not None
        logits = model.linear(arch.output_embedding, last)
        f.module = ""
        compared = [f.new(("b", "s", FEATURES * hidden_size), setup.dtype, "cat") for _ in range(2)]
        del written, states, last, embedded, logits, compared
    f.mark("backward")
    model.kept.clear()
    model.batch.clear()
    read = timeline(f, model.stacks, vocab=arch.vocab_size)
    loss = LossSizes("full", 0, 0, 0, prompted=False)
    return ending(read, read.with_derived(sizes(rows, tokens, virtual_tokens=0, loss=loss)))


def ending(beside_step: Timeline, dims: Mapping[str, int], *, phase: str = GENERATE) -> Generation:
    """A timeline as one phase before the step, or behind it."""
    end = len(beside_step.events)
    windows = ((phase, 0, end), ("", end, end))
    waves = waves_of(beside_step.move_of, [count for _, count in beside_step.moves], windows[:1])
    return Generation(beside_step._replace(windows=windows, counted=windows, waves=waves), dims, phase)
