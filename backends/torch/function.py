"""The solution as a function that Torch differentiates: in reverse, forward, under ``torch.func``, to any order.

Let y*(θ) solve F(y, θ) = 0, with A = ∂F/∂y and B = ∂F/∂θ. Two functions with a derivative rule each are enough:

`Implicit`: θ -> y*. Reverse, θ̄ = −Bᵀ Solve(Aᵀ, v); forward, ẏ = Solve(A, −B θ̇).

`Solve`: (y, θ, b) -> x with A(y, θ) x = b, or with Aᵀ. Differentiating, A ẋ = ḃ − Ȧ x. So with z = A⁻ᵀ x̄ the cotangents
are b̄ = z and (ȳ, θ̄) = −∇_(y,θ) ⟨z, A(y, θ) x⟩, where z is a `Solve` again: any order follows.

Their ``forward`` sees plain tensors, whatever transforms are at work, and solves by the core. Their derivatives are
made of products that compose (`Composable`). The first derivative alone needs none of that: `Cotangent` is
−Bᵀ A⁻ᵀ v by the core, from one graph and one solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from implicitdiff.arrays import Array
from implicitdiff.backends.torch.captured import by_arguments, captured
from implicitdiff.backends.torch.composable import vjp
from implicitdiff.backends.torch.problem import RecordedProblem

__all__ = ["Implicit", "Known", "Solve", "cotangent_of_theta", "tangent_of_y"]

Tensors = Sequence[Array]


def cotangent_of_theta(problem: RecordedProblem, y: Array, v: Array, tensors: Tensors) -> Array:
    """−Bᵀ A⁻ᵀ v, raveled, differentiable in y, v and θ."""
    maps = problem.composed(y, tensors)[1]
    u = Solve.apply(problem, True, y, maps.raw(v if maps.embedding is None else maps.embedding.embed(v)), *tensors)
    return -maps.B.rmatvec(maps.raw(u))


def tangent_of_y(problem: RecordedProblem, y: Array, t: Array, tensors: Tensors) -> Array:
    """−A⁻¹ B t, differentiable in y, t and θ."""
    maps = problem.composed(y, tensors)[1]
    w = maps.raw(Solve.apply(problem, False, y, maps.raw(-maps.B.matvec(t)), *tensors))
    return w if maps.embedding is None else maps.embedding.restrict(w)


class Implicit(torch.autograd.Function):
    """θ -> y*, as a raveled vector; the inputs are the problem, the tensors of θ, and those of the data."""

    @staticmethod
    def forward(problem: RecordedProblem, *tensors: Array) -> Array:
        return problem.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
        ctx.problem, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Array) -> tuple[Array | None, ...]:
        y, *tensors = ctx.saved_tensors
        problem, recording = ctx.problem, torch.is_grad_enabled()  # recording: a derivative of this one is wanted
        if recording and problem.captures:  # y* and the products depend on them, of which this would see the products
            raise captured()
        g = cotangent_of_theta(problem, y, v, tensors) if recording else Cotangent.apply(problem, y, v, *tensors)
        return None, *_wanted(problem.unraveled(g, tensors), ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Array | None) -> Array:
        with _forward_of_forward():
            y, *tensors = _primals(ctx)
            return tangent_of_y(ctx.problem, y, ctx.problem.theta_vector(tensors, tangents), tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: RecordedProblem, *tensors: Array) -> tuple[Array, int]:
        with problem.collecting():
            return _one_by_one(info, in_dims[1:], tensors, lambda *each: Implicit.apply(problem, *each)), 0


class Solve(torch.autograd.Function):
    """A⁻¹ b, or A⁻ᵀ b, for b of shape (*rhs, *items, n), of F as it is: how the system is scaled is a matter of where.

    The scales of what is solved, in numbers, and of what is differentiated need not be the same.
    """

    @staticmethod
    def forward(problem: RecordedProblem, adjoint: bool, y: Array, b: Array, *tensors: Array) -> Array:
        return problem.solve(y, b, tensors, transposed=adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
        ctx.problem, ctx.adjoint, y, _, *tensors = inputs
        ctx.save_for_backward(output, y, *tensors)
        ctx.save_for_forward(output, y, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        x, y, *tensors = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
        if any(wanted):
            ctx.problem.refuse_approximation()
        z = Solve.apply(ctx.problem, not ctx.adjoint, y, cotangent, *tensors)
        if not any(wanted):
            return None, None, None, z, *(None for _ in tensors)
        left, right = (x, z) if ctx.adjoint else (z, x)
        theta, data = ctx.problem.split(tensors)

        def pairing(y: Array, *theta: Array) -> Array:
            maps = ctx.problem.composed(y, (*theta, *data))[1]
            return -(maps.A.rmatvec(maps.raw(left)) * maps.raw(right)).sum()

        value, pull_back = vjp(pairing, y, *theta)
        by_y, *by_theta = _wanted(pull_back(torch.ones_like(value)), wanted)
        return None, None, by_y, z, *by_theta

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, dy: Array | None, db: Array | None, *tangents: Array | None) -> Array:
        ctx.problem.refuse_approximation()
        with _forward_of_forward():
            x, y, *tensors = _primals(ctx)
            theta, data = ctx.problem.split(tensors)

            def product(y: Array, *theta: Array) -> Array:
                maps = ctx.problem.composed(y, (*theta, *data))[1]
                return maps.raw((maps.A.rmatvec if ctx.adjoint else maps.A.matvec)(maps.raw(x)))

            b = -_along(product, (y, *theta), (dy, *tangents))
            return Solve.apply(ctx.problem, ctx.adjoint, y, b if db is None else db + b, *tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: RecordedProblem, adjoint: bool, *tensors: Array
    ) -> tuple[Array, int]:
        return _many(info, in_dims[2:], tensors, lambda *each: Solve.apply(problem, adjoint, *each)), 0


class Cotangent(torch.autograd.Function):
    """−Bᵀ A⁻ᵀ v, raveled, in numbers: what a backward pass wants of which no derivative is asked."""

    @staticmethod
    def forward(problem: RecordedProblem, y: Array, v: Array, *tensors: Array) -> Array:
        return problem.pullback(y, v, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: RecordedProblem, *tensors: Array) -> tuple[Array, int]:
        return _many(info, in_dims[1:], tensors, lambda *each: Cotangent.apply(problem, *each)), 0


class Known(torch.autograd.Function):
    """Numbers that are known, of a function that composes: the derivative is that of the function.

    The inputs are the function, how many numbers there are, they, and the arguments of the function.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[Array, ...]], count: int, *tensors: Array) -> tuple[Array, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        ctx.function, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.count :])
        ctx.save_for_forward(*tensors[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> tuple[Array | None, ...]:
        with by_arguments(alone=not torch.is_grad_enabled()):
            _, pull_back = vjp(ctx.function, *ctx.saved_tensors)
            found = pull_back(cotangents)
        wanted = ctx.needs_input_grad[2 + ctx.count :]
        return None, None, *(None,) * ctx.count, *_wanted(found, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Array | None) -> tuple[Array, ...]:
        with _forward_of_forward():
            return _along(ctx.function, tuple(_primals(ctx)), tangents[2 + ctx.count :])


def _wanted(found: Sequence[Array | None], wanted: Sequence[bool]) -> tuple[Array | None, ...]:
    """Keep the cotangents that are wanted; None for those, and for inputs beyond the last that has one."""
    padded = (*found, *(None,) * (len(wanted) - len(found)))
    return tuple(g if want else None for g, want in zip(padded, wanted, strict=True))


# -- forward mode ------------------------------------------------------------------------------------
# Torch runs a jvp rule with forward mode switched off, and so gives zeros, in silence, for the derivative of a
# derivative. With it switched on, what was saved must not bring the tangents along that are being pushed already.
_forward_of_forward = partial(torch.autograd.forward_ad._set_fwd_grad_enabled, True)


def _primals(ctx: Any) -> list[Array]:
    return [torch.autograd.forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]


def _along(function: Callable[..., Any], at: tuple[Array, ...], directions: Sequence[Array | None]) -> Any:
    """Derivative of a function along directions: the adjoint of its adjoint, which is safe in threads."""
    value, pull_back = vjp(function, *at)
    zeros = tuple(map(torch.zeros_like, value)) if isinstance(value, tuple) else torch.zeros_like(value)
    along = tuple(torch.zeros_like(x) if d is None else d for x, d in zip(at, directions, strict=False))
    return vjp(pull_back, zeros)[1](along)[0]


# -- under vmap --------------------------------------------------------------------------------------
Apply = Callable[..., Array]


def _many(info: Any, in_dims: Sequence[int | None], tensors: Tensors, apply: Apply) -> Array:
    """Map (y, b, *tensors) -> vectors over a batch: as many right-hand sides where only b has one."""
    (y, b, *rest), dim = tensors, in_dims[1]
    if dim is None or any(d is not None for i, d in enumerate(in_dims) if i != 1):
        return _one_by_one(info, in_dims, tensors, apply)
    b = b.movedim(dim, 0)
    out = apply(
        y, b.reshape(-1, *b.shape[b.ndim - y.ndim :]), *rest
    )  # more unknowns than y, where there are multipliers
    return out.reshape(*b.shape[: b.ndim - y.ndim], *out.shape[1:])


def _one_by_one(info: Any, in_dims: Sequence[int | None], tensors: Tensors, apply: Apply) -> Array:
    outs = []
    for i in range(info.batch_size):
        each = (x if d is None else x.select(d, i) for x, d in zip(tensors, in_dims, strict=True))
        outs.append(apply(*each))
    return torch.stack(outs)
