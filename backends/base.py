"""What a backend is: an abstract class of some ten methods, and a default for the rest.

A backend holds what the array standard lacks, and no mathematics. All methods here see flat vectors of shape
``(*items, n)``, where ``items`` is ``()`` or ``(number of items,)``; products take vectors with one more leading
axis, of right-hand sides. Arithmetic goes through ``xp``. Of another library, `implicitdiff.testing.check_backend`
says what is missing, and `implicitdiff.register_backend` makes it known.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import array_api_compat
import numpy as np

from implicitdiff.arrays import Array, any_true
from implicitdiff.errors import BackendError
from implicitdiff.linalg.vector_space import ArraySpace
from implicitdiff.mode import Mode

__all__ = ["Backend", "Derivatives"]


class Derivatives(Protocol):
    """The derivatives of a vector function G(y, θ) at one point."""

    @property
    def kind(self) -> str:
        """``"autodiff"``, ``"complex step"`` or ``"finite differences"``."""

    @property
    def accuracy(self) -> float:
        """Relative error of a product, beyond rounding: 0 for exact derivatives."""

    def value(self) -> Array:
        """G(y, θ)."""

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v."""

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u."""

    def hvp(self, v: Array) -> Array:
        """(∂G/∂y) v for a symmetric ∂G/∂y: the cheaper of the two products."""

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""


class Backend(ABC):
    """One framework.

    Attributes
    ----------
    xp : module
        The array namespace, from array-api-compat.
    """

    name: str = "backend"
    mode: ClassVar[Mode] = Mode.EAGER
    """How what is computed with this backend runs."""
    shared: bool = False
    """Whether what is made in this mode is used together with what is made in another: then F has to come out the same
    in both, and its form cannot depend on what is seen here alone."""
    xp: Any

    traced: ClassVar[bool] = False
    """Whether values are not seen, only their shapes: nothing can be branched on, raised or warned about."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.traced = cls.mode is not Mode.EAGER

    # -- arrays of the user ------------------------------------------------------------------------
    @abstractmethod
    def is_array(self, x: Any) -> bool:
        """Whether it is an array of this framework."""

    @abstractmethod
    def as_leaf(self, leaf: Any, where: str) -> Array:
        """Return a leaf of the user's tree as an array of the framework; raise for a wrong type or dtype."""

    def as_array(self, x: Any, device: Any, dtype: Any) -> Array | None:
        """Return what a callback returned as an array; None where it is none."""
        if isinstance(x, (int, float)) and not hasattr(x, "dtype"):
            return self.xp.asarray(x, dtype=dtype, device=device)
        return x if self.is_array(x) else None

    def common_dtype(self, dtypes: Sequence[Any]) -> Any:
        """Return the dtype of the vector that holds leaves of these dtypes."""
        if len(dtypes) == 1:
            return dtypes[0]
        return self.xp.result_type(*dtypes) if dtypes else self.xp.float64

    def common_device(self, arrays: Sequence[Array], name: str) -> Any:
        """Return the device of the arrays; raise where there are several."""
        if len(arrays) == 1:
            return self.device(arrays[0])
        devices = list(dict.fromkeys(map(self.device, arrays)))
        if len(devices) > 1:
            raise BackendError(f"{name} lies on several devices: {', '.join(map(str, devices))}. Move it to one.")
        return devices[0] if devices else None

    def device(self, x: Array) -> Any:
        """Device of an array."""
        return array_api_compat.device(x)

    def number(self, x: Array) -> Any:
        """Return a 0-d array as the framework's scalar, for leaves that came as Python floats."""
        return x

    def guard(self, x: Array) -> Array:
        """Return what a callback may see of our own memory: read-only, where the framework can say so."""
        return self.xp.asarray(x, copy=True)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Reshape, also a value that is being traced."""
        return self.xp.reshape(x, shape)

    def concat(self, parts: Sequence[Array]) -> Array:
        """Concatenate along the last axis, also values that are being traced."""
        return self.xp.concat(list(parts), axis=-1)

    def astype(self, x: Array, dtype: Any) -> Array:
        """Cast, also a value that is being traced."""
        return self.xp.astype(x, dtype, copy=False)

    def to_double(self, x: Array) -> Array:
        """Return the array in double precision, where the framework has it."""
        return self.xp.astype(x, self.xp.float64, copy=False)

    # -- the user's functions ------------------------------------------------------------------------
    vmap: Callable[[Callable[..., Array]], Callable[..., Array]] | None = None
    """Turns a function of arrays into one over a leading axis of all of them; None where the framework cannot."""

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which everything of ours is computed: no warnings, no recording of derivatives."""
        # A NaN or an overflow in NumPy arithmetic is found in the result and told by name, with its cause; NumPy's
        # own warning about it would come first, and from a line of ours.
        return np.errstate(all="ignore")

    def callback(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a user's function as it is to be called from within that context."""
        return function

    # -- derivatives ---------------------------------------------------------------------------------
    stretch: float = 1.0
    """Factor of the steps of differences."""
    degree: int = 4
    """Order of their formulas."""

    def varied(self, stretch: float) -> Any:
        """Return a copy whose differences are taken at steps that are longer by a factor."""
        other = copy.copy(self)
        other.stretch = stretch
        return other

    def finer(self) -> Any:
        """Return a copy whose differences are of eighth order: far better ones, where a function is smooth."""
        other = copy.copy(self)
        other.degree = 8
        return other

    @abstractmethod
    def differentiate(self, function: Callable[..., Array], y: Array, theta: Array) -> Derivatives:
        """Derivatives of a vector function."""

    @abstractmethod
    def differentiate_gradient(self, function: Callable[..., Array], y: Array, theta: Array) -> Derivatives:
        """Derivatives of ∇_y f for a scalar function f (one scalar per item)."""

    @abstractmethod
    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        """∂L/∂y, ∂L/∂θ and their kind, for a scalar function L (one scalar per item)."""

    custom_derivative: Callable[..., Any] | None = None
    """``(function, theta, args, kwargs)``: runs the solver of an `ImplicitFunction`, whose solution the framework then
    differentiates; None where it has no autodiff."""
    linearization: Callable[..., Any] | None = None
    """Makes a `Linearization` that records what is done with its results; None: there is nothing to record."""
    solve_system: Callable[[Any], Any] | None = None
    """Solves a linear system so that the framework can differentiate the solution; None: in numbers."""
    runner: Any = None
    """``runner(task)`` runs the rules where values are never seen (``traced``)."""

    def check_dependence(self, function: Callable[[Array], Array], theta: Array) -> None:  # noqa: B027
        """Raise for an F that does not use θ, where nothing could be told once a result is there."""

    def combined(self, maps: Any, y: Array, theta: Array) -> Any:
        """Return the maps of the whole problem, where this process holds a part of it."""
        return maps

    @property
    def spread(self) -> bool:
        """Whether the program at work is one that several devices run, each on values of its own."""
        return False

    def detached(self, x: Array) -> Array:
        """Return an array through which nothing is differentiated."""
        return x

    def underivable(self, tree: Any, error: Callable[[], Exception]) -> Any:
        """Return a tree of values of which a derivative is an error, where the framework is tracing."""
        return tree

    # -- vectors -------------------------------------------------------------------------------------
    def space(self, x: Array) -> Any:
        """Return the space of a vector, in which the iterative solvers work."""
        return self.vector_space(x.shape, x.dtype, self.device(x))

    def vector_space(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        """Return the space of the vectors of that shape ``(*items, n)``."""
        return ArraySpace(self.xp, shape, dtype, device)

    def trees(self, y: Any, theta: Any) -> bool:
        """Whether products alone may work on the leaves of the trees, so that nothing is concatenated."""
        return False

    def is_vector(self, tree: Any) -> bool:
        """Whether a tree is a bare array of one axis, and a vector as it is."""
        return len(getattr(tree, "shape", ())) == 1

    def local(self, y: Any, theta: Any) -> bool:
        """Whether y and theta are here as a whole, with numbers to look at."""
        return True

    def address(self, x: Array) -> Any:
        """Return what tells that two arrays are one memory, in whatever shape; None where nothing does."""
        return None

    def look_at(self, x: Array) -> Array:
        """Return an array in whose library a few operations, each done once, cost little."""
        return x

    def put_back(self, x: Array) -> Array:
        """Return such an array as one of the framework."""
        return x

    # -- the host ------------------------------------------------------------------------------------
    def to_host(self, x: Array) -> Any:
        """Return an array as one of NumPy."""
        return np.asarray(x)

    def sees(self, *arrays: Array) -> bool:
        """Whether these hold numbers to look at."""
        return not self.traced

    def on_host(
        self, function: Callable[..., Sequence[Any]], like: Sequence[tuple[tuple[int, ...], Any, Any]], *arrays: Array
    ) -> tuple[Array, ...]:  # fmt: skip
        """Call a function of NumPy arrays on arrays of the framework; ``like`` are shapes, dtypes and device of what
        it returns.
        """
        found = zip(function(*map(self.to_host, arrays)), like, strict=True)
        return tuple(self.xp.asarray(np.array(x), dtype=dtype, device=device) for x, (_, dtype, device) in found)

    # -- loops ---------------------------------------------------------------------------------------
    @abstractmethod
    def while_loop(
        self, cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any, limit: int | None = None
    ) -> Any:
        """``while cond(state): state = body(state)``.

        ``limit`` is the most bodies that may run. Where it is given, a body that runs after the condition has become
        false does no harm, and the condition may be looked at now and then only.
        """

    def if_any(self, wanted: Array, function: Callable[[Any], Any], value: Any) -> Any:
        """``function(value)`` where any of the mask holds, else ``value``: work that is seldom needed."""
        return function(value) if any_true(self.xp, wanted) else value

    def batched(self, product: Callable[[Array], Array], items: tuple[int, ...]) -> Callable[[Array], Array]:
        """Let a function of ``(*items, n)`` take ``(k, *items, n)``, too."""

        def many(x: Array) -> Array:
            if len(x.shape) == len(items) + 1:
                return product(x)
            if not x.shape[0]:
                return product(self.xp.zeros(x.shape[1:], dtype=x.dtype, device=self.device(x)))[None, ...][:0, ...]
            # a callback may return the same buffer each time
            return self.xp.stack([self.xp.asarray(product(x[i, ...]), copy=True) for i in range(x.shape[0])])

        return many

    def outside(
        self, function: Callable[..., Sequence[Any]], arrays: Sequence[Array], shapes: Sequence[tuple[int, ...]]
    ) -> list[Array]:
        """Call a function of NumPy's arrays, from wherever the framework is, of which no derivative is taken.

        Parameters
        ----------
        function : callable
            Takes arrays that may have more leading axes than ``arrays``, each as long as the others' or one, and
            returns arrays with them.
        arrays : sequence of array
        shapes : sequence of tuple
            Of what is returned, without those axes; the dtype is the arrays' common one.
        """
        device = self.device(arrays[0])
        return [self.xp.asarray(x, device=device) for x in function(*map(self.to_numpy, arrays))]

    def to_numpy(self, x: Array) -> Any:
        """Return an array as one of NumPy."""
        return np.from_dlpack(x)

    def synchronize(self, tree: Any) -> None:  # noqa: B027
        """Wait until a result is there: at once, where nothing runs ahead of the host."""

    def peak_memory(self, function: Callable[[], Any]) -> int | None:
        """Run a function, and return the most bytes that it held at once; None where that cannot be seen."""
        return None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pure ``function(backend, data, *trees)`` as one of ``(data, *trees)``: compiled, where that is done.

        ``backend`` is the one to compute with inside; ``data`` holds arrays and whatever else, the same at every call.
        """

        def call(*trees: Any) -> Any:
            with self.computing():
                return function(self, *trees)

        return call

    def black_box(self, function: Callable[..., Any], like: Any) -> Callable[..., Any]:
        """Return a function of trees of arrays that need not be traceable, and returns what is ``like`` a tree."""
        return self.callback(function)

    # -- linear algebra ------------------------------------------------------------------------------
    linear: Callable[..., Any] | None = None
    """``(prepared, b, x0, transposed)``: what to call in place of ``prepared.solve``: so that the solve is
    differentiable where the framework is tracing; None where it is as it is."""

    def solved(self, system: Any) -> Any:
        """Solve a `System` where the arrays are, or by a program of its own."""
        return system.solved()

    @abstractmethod
    def lu_factor(self, matrix: Array) -> Any:
        """LU factors of ``(*items, n, n)``."""

    @abstractmethod
    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        """Solve with columns b, shape ``(*items, n, k)``."""

    @abstractmethod
    def cho_factor(self, matrix: Array) -> Array:
        """Lower Cholesky factors; NaN in the items that are not positive definite."""

    @abstractmethod
    def cho_solve(self, factor: Array, b: Array) -> Array:
        """Solve with columns b, shape ``(*items, n, k)``."""

    def triangular_inverse(self, upper: Array) -> Array:
        """Inverse of upper triangular matrices ``(*items, k, k)``, whose diagonal is one."""
        return self.xp.linalg.inv(upper)

    def has_ldl(self, matrix: Array) -> bool:
        """Whether `ldl_factor` of such a matrix is an LDLᵀ factorisation, and not LU in its place."""
        return False

    def ldl_factor(self, matrix: Array) -> Any:
        """LDLᵀ factors of symmetric ``(*items, n, n)``."""
        return self.lu_factor(matrix)

    def ldl_solve(self, factor: Any, b: Array) -> Array:
        """Solve with columns b, shape ``(*items, n, k)``."""
        return self.lu_solve(factor, b, False)
