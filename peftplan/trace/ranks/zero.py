"""ZeRO: DeepSpeed's own engine on fake tensors, over the fake process group, made as accelerate and Trainer make it.

The fake device is the CPU, with streams as CUDA has them (`accelerator`). No gradient is infinite, and ranks that are not there
are not asked whether they agree. The model is on the host until DeepSpeed moves it, unless it is quantized. A step begins with
that of the optimizer over a rank's partitions, as in a rehearsal: norms before it are backward's. DeepSpeed meets the whole
depth, since buckets are not full at the same place in each layer; under ZeRO-1 and ZeRO-2 the layers themselves are `played`.
A GPU is as fast as the host: what `record_stream` marks is free at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from peftplan.depth.expand import NotRepeatingError
from peftplan.depth.layers import Layers
from peftplan.depth.log import Moment, Storage
from peftplan.depth.shallow import Stack
from peftplan.distributed.zero import SUB_GROUP, UNDECAYED, automatic, by_tensor, limits, reduce_bucket
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.libraries.meta import build_config
from peftplan.optim import parse_optim
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import load
from peftplan.trace.model import Built
from peftplan.trace.optimizers import torch_optimizer
from peftplan.trace.ranks.accelerator import on_fake_cards
from peftplan.trace.ranks.fsdp1 import addressed
from peftplan.trace.ranks.group import OneOfSeveral, process_group
from peftplan.trace.ranks.one_gpu import OneGpu
from peftplan.trace.ranks.played import ModelAlone, Player, plays
from peftplan.trace.ranks.zero3 import ENGINE, OwnedTracker, noted, owned, with_sent
from peftplan.units import ceil_div

VALUES_PER_BYTE = 2
"""Of a weight in 4 bits."""
VALUE = torch.ops.aten._local_scalar_dense.default
CONFIGURED = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients", "reduce_bucket_size"),
    *("allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
)
"""Fields of `zero_optimization`."""


class ZeroTracker(OwnedTracker):  # type: ignore[no-untyped-call]
    """A tracker that knows what DeepSpeed reads of tensors: norms, and bytes that say whether a gradient is infinite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is read outside the model."""
        if func is VALUE and not self._stack:
            return 0 if args[0].dtype == torch.uint8 else self._scalar(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass
class Zero(OneOfSeveral):
    """One rank of DeepSpeed's ZeRO. Ranks differ in the gradients that they keep."""

    tracker = ZeroTracker
    _engine: Any = field(default=None, init=False)
    _optimizer: Any = field(default=None, init=False)
    _bucket: int = field(default=0, init=False)
    """Elements of the bucket of ZeRO-3, where its fillings are noted."""

    @property
    def more_steps(self) -> int:
        """The second step of ZeRO-3 can leave the allocator without a block for a weight that is gathered."""
        return 1 if self.distributed.strategy == "zero3" else 0

    def world(self) -> AbstractContextManager[None]:
        """The process group."""
        return process_group(self.distributed.world_size, rank=self.rank)

    def prepared(self, built: Built, setup: Setup) -> Setup:
        """The setup of the step: DeepSpeed casts the weights, and runs without autocast."""
        return setup.model_copy(update={"autocast": "none"})

    def extended(
        self, stacks: tuple[Stack, ...], config: Mapping[str, Any], setup: Setup, quant: QuantConfig | None
    ) -> tuple[Stack, ...]:
        """The stack of ZeRO-3 if it is far deeper than what is gathered ahead or kept; buckets are filled as by default."""
        distributed, fills = self.distributed, setup.gradient_accumulation_steps == 1
        usual = distributed.contiguous_gradients is not False and distributed.reduce_scatter is not False
        if distributed.strategy != "zero3" or len(stacks) != 1 or not (usual and fills):
            return ()
        reached = limits(distributed, _hidden_size(build_config(config, name="model")))
        ahead = reached.prefetch_bucket + max(reached.max_live, reached.max_reuse)
        packed = 1 if quant is None else VALUES_PER_BYTE * ITEMSIZE[quant.quant_storage]
        deep = replace(stacks[0], reach=ceil_div(ahead, stacks[0].elements // packed))
        return (deep,) if deep.layers > sum(deep.samples) else ()

    def model_alone(self, setup: Setup) -> OneGpu | None:
        """The model of ZeRO-1 and ZeRO-2. With reentrant checkpoints gradients arrive in a backward of each layer's own."""
        whole = self.distributed.strategy != "zero3"
        return ModelAlone() if whole and not (setup.gradient_checkpointing and setup.use_reentrant) else None

    @contextmanager
    def started(self, tracker: Tracker) -> Iterator[None]:
        """DeepSpeed on fake cards."""
        if find_spec("deepspeed") is None:
            by = f"DeepSpeed's own engine under {self.distributed.facts.called}"
            raise RefusedError(f"engine: trace runs {by}: pip install deepspeed; accepted: analytic")
        assert isinstance(tracker, ZeroTracker)
        here = {"RANK": self.rank, "LOCAL_RANK": 0, "WORLD_SIZE": self.distributed.world_size}
        named = {name: str(value) for name, value in here.items()}
        notes = noted(tracker) if self.stacks else nullcontext()
        with patch.dict(os.environ, named), on_fake_cards(tracker), addressed(), owned(tracker), notes, self._told():
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Trainer tells transformers of ZeRO-3, whom peft asks before it gathers parameters (`gather_params_ctx`)."""
        from peft.utils import integrations

        with patch.object(integrations, "check_deepspeed_zero3_enabled", lambda: self.distributed.strategy == "zero3"):
            yield

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Make the optimizer and DeepSpeed's engine."""
        import deepspeed  # type: ignore[import-not-found]

        model = built.model
        assert isinstance(tracker, ZeroTracker)
        tracker.names.update((id(parameter), name) for name, parameter in model.named_parameters())
        if quant is not None:
            load(built, tracker, setup, quant)

        def moved(*where: Any, **options: Any) -> Any:
            if quant is None:
                tracker._paused -= 1
                load(built, tracker, setup.model_copy(update={"adapter_dtype": setup.dtype}), quant)
            return model

        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [[p for name, p in named if bool(UNDECAYED.search(name)) is undecayed] for undecayed in (False, True)]
        if self.stacks:
            self._bucket = reduce_bucket(self.distributed, _hidden_size(built.hf_config))
            self._check_repeats(named)
        self._optimizer = torch_optimizer(setup, [{"params": group} for group in groups])
        config = self._config(built, setup)
        model.to = moved
        if self.distributed.strategy == "zero3" and by_tensor(self.distributed, quantized=quant is not None):
            self._load_by_tensor(built, tracker, setup, config)
        elif quant is None:
            tracker._paused += 1
        try:
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config_params=config)
        finally:
            del model.to
        self._name(built, tracker)
        if self.model is not None and plays(self.model):
            built.model.forward = Player(self.model, tracker, built.model).forward
        base = self._engine.optimizer.optimizer

        def stepping(*step: Any) -> None:
            if tracker.phase != "step":
                tracker.begin("step")

        base.register_step_pre_hook(stepping)

    def _check_repeats(self, trained: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Raise NotRepeatingError if a gradient has no place in a bucket, or if the optimizer of the whole model takes what
        trains in several groups (deepspeed, runtime/zero/stage3.py, `_create_fp16_sub_groups`).
        """
        if max(p.numel() for _, p in trained) > self._bucket:
            raise NotRepeatingError("a gradient that is larger than the bucket is kept until the next one arrives")
        (stack,) = self.stacks
        times = {None: 1, 0: stack.layers}  # the first layer stands for all
        number = Layers(stack.name).number
        parts = (times.get(number(name), 0) * ceil_div(p.numel(), self.distributed.world_size) for name, p in trained)
        if sum(parts) > (self.distributed.sub_group_size or SUB_GROUP):
            raise NotRepeatingError("several groups of the optimizer")

    def complete(
        self, log: Sequence[Moment], began: Sequence[tuple[int, str]]
    ) -> tuple[Sequence[Moment], Sequence[tuple[int, str]]]:
        """The log of the whole depth with the buckets that are sent."""
        if not self.stacks:
            return log, began
        return with_sent(log, began, bucket=self._bucket, world_size=self.distributed.world_size)

    def _load_by_tensor(self, built: Built, tracker: Tracker, setup: Setup, config: dict[str, Any]) -> None:
        """Divide each tensor as it is made, as `from_pretrained` does under `deepspeed.zero.Init`; gather those of a module to
        load them (transformers, integrations/deepspeed.py, `_load_state_dict_into_zero3_model`). A tied head is divided too.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init  # type: ignore[import-not-found]

        names = {id(p): name for name, p in built.model.named_parameters()}
        divide = Init._zero_init_param

        def arriving(init: Any, parameter: nn.Parameter) -> None:
            name = names[id(parameter)]
            tracker.register(parameter, built.owners[name], name)
            divide(init, parameter)

        def parameters_of(owner: str) -> nn.ParameterList:
            return nn.ParameterList(p for name, p in built.model.named_parameters() if built.owners[name] == owner)

        with patch.object(Init, divide.__name__, arriving):
            Init(module=parameters_of("weights"), config_dict_or_path=config)
            head = self._tied_head(built, tracker, setup)
            for module in built.base.modules():
                own = [p for p in module._parameters.values() if p is not None and built.owners[names[id(p)]] == "weights"]
                if own:
                    with GatheredParameters(own, modifier_rank=0):
                        pass
            if head is not None:
                tracker.end(head)
            for name, buffer in built.model.named_buffers():
                tracker.register(buffer, "buffers", name)
            Init(module=parameters_of("adapter_weights"), config_dict_or_path=config)

    def _tied_head(self, built: Built, tracker: Tracker, setup: Setup) -> Storage | None:
        """A rank's part of a head that is tied once all is loaded."""
        head, table = built.base.get_output_embeddings(), built.base.get_input_embeddings()
        if head is None or getattr(head, "weight", None) is not getattr(table, "weight", 0):
            return None
        itemsize, numel = ITEMSIZE[setup.dtype], head.weight.ds_numel
        whole, own = (
            tracker.passing(nbytes=itemsize * n, shape=(n,), dtype=setup.dtype, op="load", category="weights")
            for n in (numel, ceil_div(numel, self.distributed.world_size))
        )
        tracker.end(whole)
        return own

    def _name(self, built: Built, tracker: Tracker) -> None:
        """Name what DeepSpeed made of what trains."""
        zero = self._engine.optimizer
        for number, master in enumerate(getattr(zero, "fp32_partitioned_groups_flat", ())):
            tracker.register(master, "optimizer_states", f"fp32 master of flat group {number}")
        if (flat := getattr(zero, "grad_partitions_flat_buffer", None)) is not None:
            tracker.register(flat, "gradients", "grad_partitions_flat_buffer")
        for number, flat in enumerate(getattr(zero, "bit16_groups_flat", ())):
            owner = built.owners[next(name for name, p in built.model.named_parameters() if p.requires_grad)]
            tracker.register(flat, owner, f"flat group {number}")
        for number, master in enumerate(getattr(zero, "single_partition_of_fp32_groups", ())):
            tracker.register(master, "optimizer_states", f"fp32 master of flat group {number}")

    def _config(self, built: Built, setup: Setup) -> dict[str, Any]:
        """DeepSpeed's config, with what accelerate fills in."""
        sizes = automatic(_hidden_size(built.hf_config))
        values = {name: getattr(self.distributed, name) for name in CONFIGURED}
        zero = {name: sizes[name] if value == "auto" else value for name, value in values.items() if value is not None}
        return {
            "zero_optimization": {"stage": int(self.distributed.strategy[-1]), **zero},
            setup.dtype: {"enabled": True},
            "gradient_clipping": 1.0,
            "train_micro_batch_size_per_gpu": setup.batch_size,
            "gradient_accumulation_steps": setup.gradient_accumulation_steps,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**40,
        }

    def called(self, built: Built) -> nn.Module:
        """DeepSpeed's engine."""
        engine: nn.Module = self._engine
        return engine

    def stepping(self, built: Built, tracker: Tracker, setup: Setup) -> EngineSteps:
        """What stands for the optimizer in the loop."""
        assert isinstance(tracker, ZeroTracker)
        return EngineSteps(self._engine, tracker, parse_optim(str(setup.optim)).step_implementation == "foreach")

    def batches(self, built: Built) -> Callable[[bool], None]:
        """What is called before each micro batch: the last one of a step ends at a boundary (accelerate, utils/deepspeed.py)."""
        return lambda last: self._engine.set_gradient_accumulation_boundary(is_boundary=last)


def _hidden_size(hf_config: Any) -> int:
    size: int = hf_config.get_text_config(decoder=True).hidden_size
    return size


@dataclass
class EngineSteps:
    """DeepSpeed's engine in the place of an optimizer: it runs backward, clips and frees gradients itself."""

    engine: Any
    tracker: ZeroTracker
    host_steps: bool
    """Whether the `step` counters lie on the CPU."""

    def backward(self, loss: torch.Tensor) -> None:
        """The engine's own backward, and its step behind the last one (accelerate, `DeepSpeedEngineWrapper.backward`), while the
        caller still has the loss. What a rank keeps of the gradients is named.
        """
        self.tracker.of = ENGINE
        self.engine.backward(loss, scale_wrt_gas=False)
        self._name_gradients()
        if self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        self.tracker.of = ""

    def _name_gradients(self) -> None:
        for group, gradients in getattr(self.engine.optimizer, "averaged_gradients", {}).items():
            for gradient in gradients or ():
                self.tracker.register(gradient, "gradients", f"gradients of the rank's partition of flat group {group}")

    def step(self) -> None:
        """It has stepped."""

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Nothing is left."""

    def after_step(self) -> None:
        """Name the states, and remove counters in host memory from the log."""
        host = []
        for number, states in enumerate(self.engine.optimizer.optimizer.state.values()):
            for key, value in states.items():
                if key == "step" and self.host_steps:
                    host.append(value)
                elif isinstance(value, torch.Tensor):
                    self.tracker.register(value, "optimizer_states", f"flat group {number}.{key}", op="optimizer")
        self.tracker.forget(host)
