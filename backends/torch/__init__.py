"""Torch: autograd, torch.func, LAPACK and cuSOLVER, differentiable solutions, process groups and DTensors."""

from implicitdiff.backends.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
