"""Derivatives that the user gave, held against the function and each other."""
