"""Loops over gradients: bilevel optimisation, its schedules of tolerances, inner solvers and optimisers."""
