"""Quadratic programs solved in NumPy's arrays: by Newton's method on the active set, and by Clarabel."""
