"""Where states lie: the real `init_state` and `step` on fake CUDA parameters (FakeTensorMode needs no GPU)."""

from __future__ import annotations

from contextlib import suppress

import pytest

from peftplan.optim import states

torch = pytest.importorskip("torch")
SHORT = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.uint8": "uint8"}


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_parameter(shape):
    parameter = torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=torch.bfloat16))
    parameter.grad = torch.empty_like(parameter)
    return parameter


def places(state):
    """Name → (dtype, shape, place); "meta" stands for managed memory, see `bnb_states`."""
    names = {"cuda": "device", "cpu": "host", "meta": "managed"}
    return {
        name: (SHORT[str(tensor.dtype)], tuple(tensor.shape), names[tensor.device.type])
        for name, tensor in state.items()
        if torch.is_tensor(tensor) and not name.startswith("qmap")
    }


def ours(optim, shape, **optim_args):
    allocations = states(optim, shape=shape, dtype="bf16", optim_args=optim_args)
    return {state.name: (state.dtype, state.dims, state.place) for state in allocations}


@pytest.mark.parametrize(
    ("optim", "cls", "settings"),
    [
        ("adamw_torch", "AdamW", {}),
        ("adamw_torch_fused", "AdamW", {"fused": True}),
        ("sgd", "SGD", {}),
        ("sgd", "SGD", {"momentum": 0.9}),
        ("adagrad", "Adagrad", {}),
        ("rmsprop", "RMSprop", {"momentum": 0.9}),
    ],
)
def test_torch_states(optim, cls, settings):
    with fake_mode():
        parameter = fake_parameter((5, 7))
        optimizer = getattr(torch.optim, cls)([parameter], lr=1e-3, **settings)
        optimizer.step()
    text = {key: str(value) for key, value in settings.items() if key != "fused"}
    assert ours(optim, (5, 7), **text) == places(optimizer.state[parameter])


def test_adafactor_states():
    optimization = pytest.importorskip("transformers.optimization")
    with fake_mode(), suppress(RuntimeError):  # the update reads the device back, after all states are made
        parameter = fake_parameter((5, 7))
        optimizer = optimization.Adafactor([parameter], lr=1e-3, scale_parameter=False, relative_step=False)
        optimizer.step()
    assert ours("adafactor", (5, 7)) == places(optimizer.state[parameter])


@pytest.fixture
def bnb_states(monkeypatch):
    """Runs bitsandbytes' real `init_state`; managed memory cannot be had here, so meta tensors stand for it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(
        bitsandbytes.functional, "get_paged", lambda *shape, dtype, device: torch.empty(shape, dtype=dtype, device="meta")
    )
    monkeypatch.setattr(bitsandbytes.functional, "fill", lambda buffer, value: None)

    def run(cls, *, shape, bits, paged):
        # built on a real parameter, since making the code tables reads tensors back
        optimizer = getattr(bitsandbytes.optim, cls)([torch.nn.Parameter(torch.zeros(1))], optim_bits=bits, is_paged=paged)
        with fake_mode():
            parameter = fake_parameter(shape)
            optimizer.param_groups[0]["params"] = [parameter]
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        return places(optimizer.state[parameter])

    return run


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("cls", "family"), [("AdamW", "adamw"), ("AdEMAMix", "ademamix"), ("Lion", "lion")])
def test_bitsandbytes_states(bnb_states, cls, family, bits, paged):
    unpaged = {("adamw", 8): "adamw_8bit", ("ademamix", 32): "ademamix", ("adamw", 32): None}
    optim = f"paged_{family}_{bits}bit" if paged else unpaged.get((family, bits), f"{family}_{bits}bit")
    if optim is None:
        pytest.skip("transformers has no name for an unpaged 32-bit AdamW of bitsandbytes")
    # 4095 | 4096 elements around the 8-bit limit; 333 × 300 = 99,900 | 1000 × 100 = 100,000 around the paged one
    for shape in ((4095,), (64, 64), (333, 300), (1000, 100)):
        assert ours(optim, shape) == bnb_states(cls, shape=shape, bits=bits, paged=paged)
