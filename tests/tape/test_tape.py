"""The pocket autograd against torch's: what it makes for a weight that is used twice, and when it is freed."""

from __future__ import annotations

import weakref

import pytest

from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor

ROWS, WIDTH, VOCAB = 8, 16, 64


def tied(f: Tape, weight: Parameter) -> Tensor:
    """`(embedding(ids) @ weight.T).sum()`, the sum as a product that keeps nothing."""
    hidden = ops.embedding(f, weight, (ROWS,))
    return products.linear(f, hidden, weight)


def most_alive(f: Tape, dims: tuple[int, ...]) -> int:
    """The most tensors of these dims that are alive at once."""
    level = most = 0
    for number in f.log:
        if f.dims[abs(number)] == dims:
            level += 1 if number > 0 else -1
            most = max(most, level)
    return most


def test_a_tied_weight_has_its_gradients_summed_in_a_new_tensor_before_one_stays() -> None:
    f, weight = Tape(), Parameter("embed.weight", (VOCAB, WIDTH), "fp32", trainable=True)
    f.backward(tied(f, weight))
    assert most_alive(f, (VOCAB, WIDTH)) == 3  # of the head, of the embedding, their sum
    assert weight.grad is not None
    assert f.names[weight.grad.storage.number] == "embed.weight.grad"  # type: ignore[union-attr]


def test_under_autocast_the_first_gradient_is_a_cast_that_the_second_is_added_into() -> None:
    f, weight = Tape(autocast="bf16"), Parameter("embed.weight", (VOCAB, WIDTH), "fp32", trainable=True)
    f.backward(tied(f, weight))
    wide = {n for n in range(1, len(f.dims)) if f.dims[n] == (VOCAB, WIDTH) and f.dtypes[n] == "fp32"}
    assert len(wide) == 2  # the cast of the head's gradient, and the embedding's; the first stays as the sum
    assert weight.grad is not None
    assert f.names[weight.grad.storage.number] == "embed.weight.grad"  # type: ignore[union-attr]


def test_torch_sums_the_gradients_of_a_tied_weight_in_a_new_tensor() -> None:
    torch = pytest.importorskip("torch")
    from torch.profiler import ProfilerActivity, profile

    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    hidden = torch.nn.functional.embedding(torch.arange(ROWS), weight)
    loss = torch.nn.functional.linear(hidden, weight).sum()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loss.backward()
    names = [event.name for event in seen.events()]
    assert "aten::add" in names
    assert "aten::add_" not in names


def test_a_weight_used_once_keeps_its_first_gradient_as_it_is() -> None:
    f, weight = Tape(), Parameter("head.weight", (VOCAB, WIDTH), "fp32", trainable=True)
    f.backward(products.linear(f, f.new((ROWS, WIDTH), "fp32", "x"), weight))
    assert most_alive(f, (VOCAB, WIDTH)) == 1


def test_a_residual_is_summed_into_what_waits_and_projections_into_a_new_tensor() -> None:
    """As torch does (tests/trace/cuda/test_differences.py): the gradient of a linear layer of three dims is a view."""

    def alive(*, residual: bool) -> int:
        f, weight = Tape(), Parameter("proj.weight", (WIDTH, WIDTH), "fp32", trainable=False)
        x = ops.add(f, f.new((1, ROWS, WIDTH), "fp32", "x"), Parameter("bias", (WIDTH,), "fp32", trainable=True))
        first = x if residual else products.linear(f, x, weight)
        out = ops.add(f, first, products.linear(f, x, weight))
        del x, first
        f.log.clear()
        f.backward(out)
        return most_alive(f, (1, ROWS, WIDTH))

    assert alive(residual=True) == 2  # what waits, and what is added to it
    assert alive(residual=False) == 3  # both, and their sum


def test_autocast_casts_the_last_argument_first_and_addmm_has_the_gradient_of_its_input_first() -> None:
    """As a trace shows: the casts of `linear(x, weight, bias)`, and then their gradients, the bias's summed by the engine."""
    f = Tape(autocast="bf16")
    weight, bias = (Parameter(name, dims, "fp32", trainable=True) for name, dims in (("w", (16, WIDTH)), ("b", (16,))))
    x = ops.scale(f, Parameter("x", (1, ROWS, WIDTH), "fp32", trainable=True))
    f.log.clear()
    out = products.linear(f, x, weight, bias)
    assert [f.dims[n] for n in f.log if n > 0] == [bias.dims, weight.dims, x.dims, out.dims]
    f.log.clear()
    f.backward(out)
    assert [f.dims[n] for n in f.log if n > 0][:4] == [out.dims, x.dims, weight.dims, bias.dims]


def test_views_of_one_base_run_in_the_order_in_which_they_were_made() -> None:
    """The latest first, each time; they all stand directly behind their base, whose number alone does not tell them apart."""

    def heads_in_backward() -> list[object]:
        f = Tape()
        x = ops.scale(f, Parameter("x", (1, ROWS, WIDTH), "bf16", trainable=True))
        views = [ops.heads(f, x, (1, heads, ROWS, WIDTH // heads), clones=True) for heads in (2, 4, 8, 16)]
        roots = [(view, f.new(view.dims, "bf16", "ones_like")) for view in views]
        del views
        f.log.clear()
        f.backward_from(roots)
        return [f.dims[-n][1] for n in f.log if n < 0 and len(f.dims[-n]) == 4]

    assert all(heads_in_backward() == [16, 8, 4, 2] for _ in range(20))


def test_a_checkpoint_within_another_keeps_what_it_gets_by_name() -> None:
    """By hand: of two inputs of checkpoints, which another makes, that by position goes when forward has ended. Backward makes it
    again, up to the last checkpoint's input, and what a checkpoint saves once."""
    f = Tape()
    weight = Parameter("weight", (ROWS, WIDTH), "fp32", trainable=True)
    x = ops.mul(f, f.new((ROWS, WIDTH), "fp32", "x"), weight)

    def layer(x: Tensor) -> Tensor:
        x = f.checkpoint_within(lambda x: ops.keeps_input(f, x, "silu"), ops.scale(f, x), by_name=False)
        return f.checkpoint_within(lambda x: ops.keeps_output(f, x, "exp"), ops.scale(f, x), by_name=True)

    out = f.checkpoint(layer, x)
    assert sum(1 if number > 0 else -1 for number in f.log) == 4  # the factor, x, the input by name, the result
    f.backward(ops.summed(f, out))
    assert weight.grad is not None
    assert sum(1 if number > 0 else -1 for number in f.log) == 3  # the factor, the result and the gradient


def test_torch_keeps_what_a_checkpoint_within_another_gets_by_name() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.checkpoint import checkpoint

    seen: list[weakref.ref[object]] = []

    def layer(x: object) -> object:
        for call in (lambda x: checkpoint(torch.sin, x, use_reentrant=False), by_name):
            x = x * 2  # type: ignore[operator]
            seen.append(weakref.ref(x))
            x = call(x)
        return x

    def by_name(x: object) -> object:
        return checkpoint(lambda *, x: x.sin(), x=x, use_reentrant=False)

    out = checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert [ref() is None for ref in seen] == [True, False]
    out.sum().backward()
    assert len(seen) == 3  # the layer ran again, up to what it had saved
