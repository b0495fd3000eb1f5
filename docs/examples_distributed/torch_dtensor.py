"""The gradient of a loss through a ridge regression whose weights are spread over processes.

Run with two processes of a machine::

    torchrun --nproc-per-node 2 torch_dtensor.py
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from implicitdiff import CG, implicit_grad


def objective(y, theta, X, T):
    """Squared error, and one penalty for each feature."""
    error = X @ y["weights"] + y["offset"] - T
    penalty = (theta.exp()[:, None] * y["weights"] ** 2).sum() + (y["offset"] ** 2).sum()
    return ((error**2).sum() + penalty) / 2


def outer(y, theta):
    """Something of the solution that is to be small."""
    return (y["weights"] ** 4).sum() + (y["offset"] ** 4).sum() + (theta**2).sum()


def solved(X, T, theta):
    """The minimum, by the normal equations."""
    Z = torch.cat([X, X.new_ones(len(X), 1)], dim=1)
    penalty = torch.cat([theta.exp(), theta.new_ones(1)])
    whole = torch.linalg.solve(Z.T @ Z + torch.diag(penalty), Z.T @ T)
    return {"weights": whole[:-1], "offset": whole[-1]}


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    T = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    theta = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    y = solved(X, T, theta)

    def spread(x, *placements):
        return distribute_tensor(x, mesh, placements)

    at = {"weights": spread(y["weights"], Shard(0)), "offset": spread(y["offset"], Replicate())}
    to, data = spread(theta, Shard(0)), (spread(X, Replicate()), spread(T, Replicate()))
    options = {"solver": CG(rtol=1e-12), "return_report": True}
    g, report = implicit_grad(objective, outer, at, to, args=data, **options)

    whole, alone = implicit_grad(objective, outer, y, theta, args=(X, T), **options)
    error = float((g.full_tensor() - whole).norm() / whole.norm())
    kept = g.placements == to.placements
    counts = f"iterations {report.iterations} and {alone.iterations}"
    print(f"rank {dist.get_rank()}: error {error:.1e}, placements kept: {kept}, {counts}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
