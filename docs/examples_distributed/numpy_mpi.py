"""The derivative of a chain of springs that is cut in two: each process holds a piece, and NumPy knows only that.

Run with two processes of a machine::

    mpiexec -n 2 python numpy_mpi.py
"""

import numpy as np
from mpi4py import MPI

from implicitdiff import CG, Stationary, implicit_vjp
from implicitdiff.backends.numpy import NumpyBackend

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()


def neighbours(y):
    """Return this piece with an entry of the piece before and of the one behind: zero at the ends of the chain."""
    before, behind = 0.0, 0.0
    if rank > 0:
        before = comm.sendrecv(float(y[0]), dest=rank - 1, source=rank - 1)
    if rank < size - 1:
        behind = comm.sendrecv(float(y[-1]), dest=rank + 1, source=rank + 1)
    return np.concatenate([[before], y, [behind]])


def stiffness(y):
    """2 y_i − y_(i−1) − y_(i+1), and a weak spring to the ground."""
    z = neighbours(y)
    return 2.01 * z[1:-1] - z[:-2] - z[2:]


# the displacements y under the loads theta: stiffness(y) + y³ = theta
chain = Stationary(
    grad=lambda y, theta: stiffness(y) + y**3 - theta,
    hvp=lambda y, theta, v: stiffness(v) + 3 * y**2 * v,
    mixed_vjp=lambda y, theta, u: -u,
    mixed_jvp=lambda y, theta, t: -t,
)


def alone(y, v):
    """The same by a matrix, from all pieces."""
    n = len(y)
    A = 2.01 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1) + np.diag(3 * y**2)
    return np.linalg.solve(A, v)


def main():
    whole, weights = np.sin(np.arange(90) / 7), np.cos(np.arange(90) / 3)
    mine = slice(40 * rank, 90 if rank == size - 1 else 40 * (rank + 1))  # pieces of unequal length will do
    y, v = whole[mine], weights[mine]
    theta = stiffness(y) + y**3

    options = {"solver": CG(rtol=1e-12), "backend": NumpyBackend(reduce=comm.allreduce)}
    g, report = implicit_vjp(chain, y, theta, v, return_report=True, **options)

    expected = alone(whole, weights)[mine]
    error = np.linalg.norm(g - expected) / np.linalg.norm(expected)
    print(f"rank {rank}: {len(g)} entries, error {error:.1e}, iterations {report.iterations}")


if __name__ == "__main__":
    main()
