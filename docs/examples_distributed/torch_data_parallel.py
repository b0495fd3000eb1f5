"""The gradient of a loss through a ridge regression whose examples are spread over processes.

Run with two processes of a machine::

    torchrun --nproc-per-node 2 torch_data_parallel.py
"""

import torch
import torch.distributed as dist

from implicitdiff import CG, implicit_grad
from implicitdiff.backends.torch import TorchBackend


def make_data():
    """Examples for training and for validation; in earnest each process would read its own."""
    generator = torch.Generator().manual_seed(0)
    X, V = torch.randn(2, 40, 8, dtype=torch.float64, generator=generator)
    weights = torch.randn(8, dtype=torch.float64, generator=generator)
    noise = torch.randn(40, dtype=torch.float64, generator=generator)
    return X, X @ weights + noise, V, V @ weights


def solved(X, t, theta):
    """The minimum over all data."""
    return torch.linalg.solve(X.T @ X + torch.diag(theta.exp()), X.T @ t)


def gradient(X, t, V, s, y, theta, share, **options):
    """dL/dθ from these examples; ``share`` is the part of the penalty that belongs to them."""

    def objective(y, theta, X, t):
        return ((X @ y - t) ** 2).sum() / 2 + share * (theta.exp() * y**2).sum() / 2

    def loss(y, theta):
        return ((V @ y - s) ** 2).sum() / 2

    return implicit_grad(objective, loss, y, theta, args=(X, t), return_report=True, **options)


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    X, t, V, s = make_data()
    theta = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    y = solved(X, t, theta)  # by any method; the same in every process

    mine = (x[rank::size] for x in (X, t, V, s))
    options = {"solver": CG(rtol=1e-12), "backend": TorchBackend(group=True)}
    spread, report = gradient(*mine, y, theta, 1 / size, **options)

    whole, alone = gradient(X, t, V, s, y, theta, 1.0, solver=CG(rtol=1e-12))
    error = float((spread - whole).norm() / whole.norm())
    print(f"rank {rank}: error {error:.1e}, iterations {report.iterations} and {alone.iterations}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
