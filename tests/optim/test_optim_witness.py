"""Every name, against the optimizer that transformers' Trainer makes: name, dtype, shape and stored bytes of each state."""

from __future__ import annotations

import pytest

from peftplan.optim import OPTIMIZERS, parse_optim_args, shared_states, states

MODULES = {"galore-torch": "galore_torch", "apollo-torch": "apollo_torch", "lomo-optim": "lomo_optim", "torch-optimi": "optimi"}
SMALL, LARGE, AWKWARD = (37, 11), (64, 96), (91, 53)  # 407, 6144 = 24 × 256, and 4823 elements: not a multiple of 256
SHAPES = ((5,), (5000,), SMALL, LARGE, AWKWARD)
NEEDS_TRITON = {"kahan_comp": 1, "mean_square": 4}  # bytes of what optimi adds on CUDA only: see below


def expected(optim, *, shape, dtype, kind="other", optim_args=None):
    """What peftplan says, in the terms of the witness; on CPU nothing is paged."""
    allocations = states(
        optim, shape=shape, dtype=dtype, in_embedding=kind == "embedding", in_target=kind == "linear",
        optim_args=parse_optim_args(optim_args),
    )  # fmt: skip
    allocations += shared_states(optim, states=allocations)
    assert len({state.name for state in allocations}) == len(allocations)
    return {state.name: (state.dtype, state.nbytes, state.dims) for state in allocations}


def without_views(by_name):
    """Projections are views, whose shape is smaller than what they keep alive: compare dtype and bytes of those."""
    return {name: value[:2] if "ortho_matrix" in name else value for name, value in by_name.items()}


def ours_and_theirs(real_states, optim, **case):
    """The states that peftplan expects and those that the optimizer makes, in the same terms."""
    package = OPTIMIZERS[optim].package
    pytest.importorskip(MODULES.get(package, package))
    ours, theirs = expected(optim, **case), real_states(optim, **case)
    if optim == "stable_adamw":
        ours = {name: value for name, value in ours.items() if value[1] != NEEDS_TRITON.get(name)}
    return without_views(ours), without_views(theirs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_states_are_those_of_the_real_optimizer(real_states, optim, dtype):
    for shape in SHAPES:
        ours, theirs = ours_and_theirs(real_states, optim, shape=shape, dtype=dtype)
        assert ours == theirs


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused", "adamw_8bit", "ademamix_8bit", "adamw_torch_4bit"])
def test_stacked_experts(real_states, optim):
    ours, theirs = ours_and_theirs(real_states, optim, shape=(4, 32, 48), dtype="bf16")
    assert ours == theirs


@pytest.mark.parametrize("optim", sorted(name for name in OPTIMIZERS if "8bit" in name))
def test_embeddings(real_states, optim):
    ours, theirs = ours_and_theirs(real_states, optim, shape=(80, 64), dtype="bf16", kind="embedding")
    assert ours == theirs
    state = theirs.get("state1", theirs.get("exp_avg.codes"))
    trainer_overrides = OPTIMIZERS[optim].package == "bitsandbytes"
    assert state[0] == ("fp32" if trainer_overrides else "uint8")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "optim_args",
    [None, "rank=8", "rank=8,proj_type=reverse_std", "rank=8,proj_type=left", "rank=8,proj_type=right",
     "rank=8,proj_type=full", "rank=100"],
)  # fmt: skip
@pytest.mark.parametrize("optim", sorted(name for name in OPTIMIZERS if name.startswith("galore")))
def test_galore_targets(real_states, optim, optim_args, dtype):
    for shape in ((96, 64), (64, 96), (600, 90)):  # the last: 600 × 8 = 4800 ≥ 4096 projected elements
        ours, theirs = ours_and_theirs(real_states, optim, shape=shape, dtype=dtype, kind="linear", optim_args=optim_args)
        assert ours == theirs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "optim_args",
    [None, "rank=8", "rank=8,proj=svd", "rank=8,scale_type=tensor,proj_type=reverse_std",
     "rank=1,proj_type=reverse_std", "rank=100", "rank=100,proj=svd"],
)  # fmt: skip
@pytest.mark.parametrize("optim", sorted(name for name in OPTIMIZERS if name.startswith("apollo")))
def test_apollo_targets(real_states, optim, optim_args, dtype):
    for shape in ((96, 64), (64, 96)):
        ours, theirs = ours_and_theirs(real_states, optim, shape=shape, dtype=dtype, kind="linear", optim_args=optim_args)
        assert ours == theirs


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("sgd", "momentum=0.9"),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("rmsprop", "momentum=0.5"),
        ("rmsprop", "centered=true"),
        ("rmsprop", "centered=True,momentum=0.5,alpha=0.9"),
        ("adagrad", "lr_decay=0.1"),
        ("ademamix", "beta3=0.999,t_alpha=10,t_beta3=10"),
        ("adamw_torch_8bit", "bf16_stochastic_round=True"),
        ("stable_adamw", "kahan_sum="),
        ("stable_adamw", "kahan_sum=False"),
        ("schedule_free_adamw", "r=1"),
        ("grokadamw", "lamb=1"),
    ],
)
def test_optim_args(real_states, optim, optim_args):
    ours, theirs = ours_and_theirs(real_states, optim, shape=LARGE, dtype="bf16", optim_args=optim_args)
    assert ours == theirs


def test_adalomo_keeps_states_for_frozen_parameters(real_states):
    pytest.importorskip("lomo_optim")
    allocations = states("adalomo", shape=LARGE, dtype="bf16", frozen=True)
    theirs = real_states("adalomo", shape=LARGE, dtype="bf16", trainable=False)
    assert {state.name: (state.dtype, state.nbytes, state.dims) for state in allocations} == theirs
    assert theirs


def test_optimi_adds_device_scalars_where_triton_runs():
    """The one thing that a CPU step cannot show: `_init_state` as on CUDA, where `group["triton"]` is true."""
    torch = pytest.importorskip("torch")
    optimi = pytest.importorskip("optimi")
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        parameter = torch.nn.Parameter(torch.zeros(LARGE, dtype=dtype))
        optimizer = optimi.StableAdamW([parameter], lr=1e-3, triton=False)  # True needs Triton installed
        optimizer.param_groups[0]["triton"] = True
        state: dict = {}
        optimizer._init_state(optimizer.param_groups[0], state, parameter)
        ours = expected("stable_adamw", shape=LARGE, dtype=short)
        assert {name: (value.nbytes, tuple(value.shape)) for name, value in state.items()} == {
            name: value[1:] for name, value in ours.items()
        }
