"""`solve_qp` where there is no solution, where the arguments do not fit, and at the edges of what it takes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from conftest import JAX, TORCH, Library
from frameworks import EACH, framework
from helpers_qp import (
    LIBS,
    Data,
    V,
    batch,
    on,
    program,
)

from implicitdiff import (
    DTypeError,
    InfeasibleError,
    InputError,
    NonFiniteError,
    NotConvergedError,
    NotPositiveDefiniteError,
    ShapeError,
    SolveWarning,
    UnboundedError,
    solve_qp,
)

# -- failures --------------------------------------------------------------------------------------------
BAD: dict[str, tuple[Data, type[Exception], str]] = {
    "infeasible": ({"G": [[1.0, 0.0], [-1.0, 0.0]], "h": [-1.0, -1.0]}, InfeasibleError, "Clarabel: PrimalInfeasible"),
    "unbounded": ({"Q": np.zeros((2, 2))}, UnboundedError, "Clarabel: DualInfeasible"),
    "nonconvex": ({"Q": np.diag([1.0, -1.0])}, NotPositiveDefiniteError, "negative eigenvalue"),
    "nan": ({"q": [np.nan, 0.0]}, NonFiniteError, "NaN or Inf"),
    "minus infinity": ({"h": [-np.inf, 0.0]}, NonFiniteError, "NaN or Inf"),
}


def small(**other: Any) -> Data:
    data = {"Q": np.eye(2), "q": [-1.0, -2.0], "G": [[-1.0, 0.0], [0.0, -1.0]], "h": [0.0, 0.0]}
    return {name: np.asarray(x, dtype=float) for name, x in {**data, **other}.items()}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_solution(name: str) -> None:
    other, kind, says = BAD[name]
    with pytest.raises(kind, match=says) as caught:
        solve_qp(**small(**other))
    assert len(str(caught.value).splitlines()) <= 5
    assert np.all(np.isnan(solve_qp(**small(**other), on_failure="nan")))
    with pytest.warns(SolveWarning, match=says):
        solve_qp(**small(**other), on_failure="warn")
    solve_qp(**small(**other), on_failure="ignore")


def test_a_solver_that_is_stopped() -> None:
    rng = np.random.default_rng(0)
    G, h, q = rng.normal(size=(200, 20)), rng.random(200), rng.normal(size=20)
    with pytest.raises(NotConvergedError, match="MaxIterations"):
        solve_qp(np.zeros((20, 20)), q, G=G, h=h, settings={"max_iter": 1})
    data, y, *_ = program()
    np.testing.assert_allclose(solve_qp(**data, settings={"max_iter": 3}), y, rtol=1e-11)  # its active set is known
    with pytest.raises(InputError, match="Clarabel has none of the name 'iterations'"):
        solve_qp(**data, settings={"iterations": 1})


@LIBS
def test_items_that_fail_are_named(lib: Library) -> None:
    """The others are solved; eagerly it is told, and in a compiled program NaN."""
    data, y, _ = batch()
    data["h"][1, 2:] = -np.inf
    data["G"][2, 1] = -data["G"][2, 0]
    data["h"][2, :2] = -1.0
    arrays = on(lib, data)
    with pytest.raises(NonFiniteError, match=r"1 of 3 solved; item 1: NonFinite; item 2: PrimalInfeasible") as caught:
        solve_qp(**arrays, batched=True)
    np.testing.assert_allclose(lib.numpy(caught.value.value)[0], y[0], rtol=1e-10)
    run = framework("jax").compiled if lib.name == "jax" else lambda f: f
    mode = "raise" if lib.name == "jax" else "nan"
    found = lib.numpy(run(lambda h: solve_qp(**{**arrays, "h": h}, batched=True, on_failure=mode))(arrays["h"]))
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), [False, True, True])
    np.testing.assert_allclose(found[0], y[0], rtol=1e-10)


@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        ({"h": None}, InputError, "has G and no h"),
        ({"Q": None}, InputError, "has q and no Q"),
        ({"q": [[1.0, 2.0]]}, ShapeError, r"q has shape \(1, 2\); expected 1 axes.\nNext: batched=True"),
        ({"G": np.ones((2, 3))}, ShapeError, r"G has shape \(2, 3\); expected \(2, 2\)"),
        ({"Q": np.eye(3)}, ShapeError, r"Q has shape \(3, 3\); expected \(2, 2\)"),
        ({"batched": True}, ShapeError, "one leading axis"),
        ({"q": np.ones((2, 2)), "h": np.ones((3, 2)), "batched": True}, ShapeError, "one leading axis"),
        ({"on_failure": "maybe"}, InputError, "on_failure"),
    ],
)
def test_arguments_that_do_not_fit(other: Any, kind: type[Exception], says: str) -> None:
    options = {name: other[name] for name in ("batched", "on_failure") if name in other}
    data = {name: x for name, x in other.items() if name not in options}
    given = {**small(), **{name: None if x is None else np.asarray(x, dtype=float) for name, x in data.items()}}
    with pytest.raises(kind, match=says):
        solve_qp(**given, **options)


def test_integers_are_refused() -> None:
    with pytest.raises(DTypeError, match="q has dtype int"):
        solve_qp(**{**small(), "q": np.array([1, 2])})


def test_without_clarabel(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"implicitdiff\[qp\]"):
        solve_qp(**small())


def test_no_items() -> None:
    data = {name: x[None][:0] for name, x in small().items()}
    assert solve_qp(**data, batched=True).shape == (0, 2)


@pytest.mark.parametrize("batched", [False, True])
@LIBS
def test_without_constraints(lib: Library, batched: bool) -> None:
    data = batch()[0] if batched else program()[0]
    Q, q = lib.array(data["Q"]), lib.array(data["q"])
    y, multipliers = solve_qp(Q, q, batched=batched, return_multipliers=True)
    assert multipliers == (None, None)
    np.testing.assert_allclose(lib.numpy(y), -np.linalg.solve(data["Q"], data["q"][..., None])[..., 0], rtol=1e-9)


@pytest.mark.slow(on=("jax",))
@EACH
def test_derivatives_without_constraints(name: str) -> None:
    """−Q⁻¹v by q, whatever else there is to differentiate."""
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    data, *_ = program()
    v, Q = lib.array(V), lib.array(data["Q"])
    gradient = fw.gradient(lambda q: (v * solve_qp(Q, q)).sum())(lib.array(data["q"]))
    np.testing.assert_allclose(lib.numpy(gradient), -np.linalg.solve(data["Q"], V), rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_vertex_at_the_origin_is_exact(rows: int) -> None:
    """A solution of 1e-24 has no size of its own to be judged by, and was called none."""
    G, h = np.ones((rows, 1)) * [[1.0, 0.0]], np.zeros(rows)
    y = solve_qp(np.eye(2), np.array([-1.0, 0.0]), G=G, h=h)
    np.testing.assert_array_equal(y, 0.0)
    y = solve_qp(np.eye(2), np.array([-1.0, -1e-3]), G=G, h=h)
    np.testing.assert_allclose(y, [0.0, 1e-3], rtol=1e-12)
