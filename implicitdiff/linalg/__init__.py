"""Linear algebra: operators and their blocks, scaling, preconditioners, the space of vectors, a solve."""
