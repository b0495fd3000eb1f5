"""LDLᵀ of symmetric indefinite systems against NumPy, and what the report says where a library does not have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg.lapack
import scipy.sparse
from conftest import JAX, NUMPY, PLAIN, TORCH, Library, outcome, relative_error, shift, through
from problems import matrix, vector

from implicitdiff import LDLT, NotSymmetricError, SingularError, Stationary, implicit_jvp, implicit_vjp, linear_solve

LIBS = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
ALL_LIBS = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
LAPACK = hasattr(scipy.linalg.lapack, "dsytrs")
SADDLES = {  # leading blocks without an inverse: there is no LDLᵀ without pivoting
    "swap": np.array([[0.0, 1.0], [1.0, 0.0]]),
    "saddle": np.block([[np.diag([1.0, 2.0, 3.0]), np.ones((3, 1))], [np.ones((1, 3)), np.zeros((1, 1))]]),
    "zero block": np.block([[np.zeros((2, 2)), np.array([[1.0, 2.0], [3.0, 5.0]])],
                            [np.array([[1.0, 3.0], [2.0, 5.0]]), np.diag([1.0, -1.0])]]),
    "one": np.array([[-3.0]]),
}  # fmt: skip


@ALL_LIBS
@pytest.mark.parametrize("name", SADDLES)
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "columns"])
def test_systems_that_need_pivoting(lib: Library, name: str, columns: tuple[int, ...]) -> None:
    a = SADDLES[name]
    b = vector(len(a), columns=columns)
    x, report = linear_solve(lib.array(a), lib.array(b), solver="ldlt", return_report=True)
    assert relative_error(lib, x, np.linalg.solve(a, b)) <= 1e-13
    assert report.converged
    has = lib in TORCH or (lib is NUMPY and LAPACK)
    assert report.solver == ("ldlt" if has else "lu")
    lacking = f"chosen by name as ldlt, which {lib.name} does not have here"
    assert report.reason == ("chosen by name" if has else lacking)


@LIBS
@pytest.mark.parametrize("door", ["vjp:hvp", "jvp:hvp", "grad:hessian", "jvp:hessian", "solve:callable"])
def test_through_the_doors(lib: Library, door: str) -> None:
    """Forward and transposed, with the matrix given or assembled from products."""
    a, b = matrix("sym", 12), vector(12)
    options = {"symmetric": True} if door == "solve:callable" else {}
    found = through(lib, door, a, b, "ldlt", **options)
    expected = np.linalg.solve(a, b)
    if door.startswith(("vjp", "grad")):
        expected = shift(12).T @ expected
    assert found.quiet, found.text
    assert relative_error(lib, found.value, expected) <= 1e-12


@LIBS
def test_batch(lib: Library) -> None:
    a = np.stack([matrix("sym", 8), -matrix("pos", 8), matrix("sym", 8) + 0.1 * np.eye(8)])
    b = vector(3, columns=(8,))
    x, report = linear_solve(lib.array(a), lib.array(b), solver="ldlt", batched=True, return_report=True)
    assert relative_error(lib, x, np.linalg.solve(a, b[..., None])[..., 0]) <= 1e-12
    assert lib.numpy(report.converged).tolist() == [True] * 3
    assert report.solver == ("ldlt" if lib in TORCH else "lu")
    assert ("does not have here" in report.reason) is (lib not in TORCH)


def test_sparse_matrix_is_factored_by_lu() -> None:
    a, b = matrix("sym", 8), vector(8)
    x, report = linear_solve(scipy.sparse.csc_array(a), b, solver="ldlt", return_report=True)
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-11)
    assert (report.solver, report.reason) == ("lu", "chosen by name as ldlt; the matrix is sparse")


@LIBS
def test_zero_right_hand_side_and_no_unknowns(lib: Library) -> None:
    x, report = linear_solve(lib.array(matrix("sym", 6)), lib.array(np.zeros(6)), solver="ldlt", return_report=True)
    assert np.all(lib.numpy(x) == 0)
    assert report.converged
    assert linear_solve(lib.array(np.zeros((0, 0))), lib.array(np.zeros(0)), solver="ldlt").shape == (0,)


@LIBS
def test_single_precision_is_solved_in_double(lib: Library) -> None:
    """Hilbert's matrix of order 5 with a sign, condition number 5e5: 1e-2 in single precision, and better here."""
    a = (scipy.linalg.hilbert(5) * np.outer(s := [1, -1, 1, 1, -1], s)).astype(np.float32)
    a[0, 0] = -a[0, 0]
    b = vector(5).astype(np.float32)
    x = linear_solve(lib.array(a), lib.array(b), solver="ldlt")
    assert x.dtype == lib.xp.float32
    assert relative_error(lib, x, np.linalg.solve(a.astype(float), b.astype(float))) <= 1e-6


@pytest.mark.parametrize("exponent", [-150, 150])
def test_scale(exponent: int) -> None:
    a, b = matrix("sym", 8), vector(8)
    x = linear_solve(10.0**exponent * a, b, solver="ldlt")
    np.testing.assert_allclose(10.0**exponent * x, np.linalg.solve(a, b), rtol=1e-11)


@LIBS
def test_damping(lib: Library) -> None:
    a, b = matrix("sym", 8), vector(8)
    x, report = linear_solve(lib.array(a), lib.array(b), solver=LDLT(damping=0.25), return_report=True)
    assert relative_error(lib, x, np.linalg.solve(a + 0.25 * np.eye(8), b)) <= 1e-12
    assert report.damping == 0.25


@LIBS
@pytest.mark.parametrize("name", ["zero row", "rank one", "rounding"])
def test_singular(lib: Library, name: str) -> None:
    a = {"zero row": np.diag([1.0, 0.0, -1.0]), "rank one": np.ones((3, 3)),
         "rounding": np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0 + 1e-15], [3.0, 6.0 + 1e-15, 1.0]])}[name]  # fmt: skip
    found = outcome(lambda: linear_solve(lib.array(a), lib.array(np.array([1.0, 2.0, 0.5])), solver="ldlt"))
    assert isinstance(found.error, SingularError), found.text


@LIBS
def test_asymmetric_matrix_is_told(lib: Library) -> None:
    found = outcome(lambda: linear_solve(lib.array(matrix("gen", 6)), lib.array(vector(6)), solver="ldlt"))
    assert isinstance(found.error, NotSymmetricError), found.text


@LIBS
def test_estimate_of_the_condition_number(lib: Library) -> None:
    a = matrix("sym", 10)
    _, report = linear_solve(lib.array(a), lib.array(vector(10)), solver="ldlt", return_report=True)
    exact = 1 / np.linalg.cond(a, 1)
    assert exact / 3 <= report.rcond <= 10 * exact


@pytest.mark.parametrize("call", [implicit_vjp, implicit_jvp])
def test_saddle_point_of_an_objective(call: Any) -> None:
    """y = −M⁻¹ θ with an indefinite M."""
    M, theta, v = matrix("sym", 6), vector(6), vector(6, seed=9)
    condition = Stationary(
        grad=lambda y, t: M @ y + t, hvp=lambda y, t, v: M @ v, mixed_vjp=lambda y, t, u: u, mixed_jvp=lambda y, t, d: d
    )
    got = call(condition, -np.linalg.solve(M, theta), theta, v, solver="ldlt")
    np.testing.assert_allclose(got, -np.linalg.solve(M, v), rtol=1e-11)
