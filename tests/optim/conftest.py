"""The witness: the optimizer that transformers' real Trainer makes, run for two steps on a small CPU model."""

from __future__ import annotations

import warnings

import pytest

SHORT = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.uint8": "uint8"}


def build(torch, shape, dtype, kind):
    """A model with one parameter of this shape: an embedding, a linear layer, or neither."""
    model = torch.nn.Module()
    if kind == "embedding":
        model.layer = torch.nn.Embedding(*shape)
    elif kind == "linear":
        model.layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    else:
        model.layer = torch.nn.Module()
        model.layer.weight = torch.nn.Parameter(torch.randn(shape))
    model.target = torch.nn.Linear(2, 3, bias=False)  # low-rank optimizers insist on at least one target
    return model.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))


def tensors(torch, state):
    """Name → tensor, looking inside torchao's quantized states and the projectors of GaLore and APOLLO."""
    for name, value in state.items():
        if hasattr(value, "tensor_attrs"):
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in value.tensor_attrs)
        elif hasattr(value, "ortho_matrix"):
            kept = value.ortho_matrix
            if torch.is_tensor(kept):
                yield f"{name}.ortho_matrix", kept
            else:
                yield from ((f"{name}.ortho_matrix.{i}", part) for i, part in enumerate(kept))
        elif torch.is_tensor(value):
            yield name, value


def state_of(optimizer, parameter, name):
    """Where each package keeps the state of one parameter."""
    if "lomo" in type(optimizer).__module__:
        stores = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
        return {store: getattr(optimizer, store)[name] for store in stores if name in getattr(optimizer, store, {})}
    if type(optimizer).__name__ == "GrokAdamW":
        return next(group["state"][parameter] for group in optimizer.param_groups if parameter in group.get("state", {}))
    if hasattr(optimizer, "optimizer_dict"):
        return optimizer.optimizer_dict[parameter].state[parameter]
    return optimizer.state[parameter]


@pytest.fixture
def real_states(monkeypatch, tmp_path):
    """A function: name → (dtype, stored bytes, shape) of every state tensor after two real steps."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)  # galore-torch calls it on CPU too
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # and lomo-optim this
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # torchao; states do not depend on it

    def run(optim, *, shape, dtype, kind="other", optim_args=None, trainable=True):
        torch.manual_seed(0)
        # a singleton that remembers overrides by id(parameter), and ids are reused
        monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)
        model = build(torch, shape, dtype, kind)
        targets = ["target", "layer"] if kind == "linear" else ["target"]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), optim=optim, optim_args=optim_args, optim_target_modules=targets,
            use_cpu=True, report_to=[],
        )  # fmt: skip
        model.layer.weight.requires_grad_(trainable)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = transformers.Trainer(model=model, args=arguments).create_optimizer()
            for _ in range(2):
                step(torch, optimizer, model)
        state = state_of(optimizer, model.layer.weight, "layer.weight")
        return {name: describe(tensor) for name, tensor in tensors(torch, state)}

    return run


def step(torch, optimizer, model):
    """Forward, backward, step, in the way each family wants it."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    loss = sum((p.float() * torch.randn(p.shape)).sum() for p in model.parameters())
    if hasattr(optimizer, "fused_backward"):
        optimizer.fused_backward(loss, 1e-3)
        return
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def describe(tensor):
    return SHORT[str(tensor.dtype)], tensor.untyped_storage().nbytes(), tuple(tensor.shape)
