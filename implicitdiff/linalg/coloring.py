"""Colours of the columns of a sparse matrix: columns of one colour share a product, and every entry can be read off.

- In general columns of one colour have no row in common (distance-2 colouring): then A (Σ e_j) holds, in each row, the
  entry of one column. Where A has a transpose and rows need fewer colours, rows are coloured.
- A symmetric A needs every entry from one side only: it is enough that no path on four vertices of its graph has two
  colours (star colouring). An arrow takes two products in place of n.

Both are greedy, in the order of falling degree, over bit masks of the colours that a row has seen.

References
----------
A. R. Curtis, M. J. D. Powell, J. K. Reid, "On the estimation of sparse Jacobian matrices", IMA J. Appl. Math. 13 (1974)
117-119. DOI 10.1093/imamat/13.1.117
A. H. Gebremedhin, F. Manne, A. Pothen, "What color is your Jacobian? Graph coloring for computing derivatives", SIAM
Review 47 (2005) 629-705. DOI 10.1137/S0036144504444711
A. H. Gebremedhin, A. Tarafdar, F. Manne, A. Pothen, "New acyclic and star coloring algorithms with application to
computing Hessians", SIAM J. Sci. Comput. 29 (2007) 1042-1072. DOI 10.1137/050639879
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from implicitdiff.linalg.pattern import Pattern

__all__ = ["Coloring", "colored", "column_colors", "star_colors"]


class Coloring(NamedTuple):
    """How a matrix of some pattern is read off a few products.

    Attributes
    ----------
    colors : array of int, shape (n,)
        Of the columns, or of the rows.
    number : int
        Number of colours, hence of products.
    transposed : bool
        Whether the products are those with Aᵀ.
    place : array of int, shape (entries,)
        Place of each entry in the products (count, n), raveled.
    """

    colors: np.ndarray
    number: int
    transposed: bool
    place: np.ndarray


def colored(pattern: Pattern, *, symmetric: bool, transposable: bool) -> Coloring:
    """Colour the columns of a pattern, or its rows where that takes fewer colours.

    Parameters
    ----------
    pattern : Pattern
        Of a symmetric matrix where ``symmetric``.
    symmetric : bool
        Whether an entry may be read as the one across the diagonal.
    transposable : bool
        Whether there are products with Aᵀ.
    """
    n, rows, columns = pattern.n, pattern.rows, pattern.columns
    if symmetric:
        return _by_star(pattern)
    colors, count = column_colors(n, rows, columns)
    if transposable and count > int(np.bincount(columns, minlength=1).max(initial=0)):
        others, fewer = column_colors(n, columns, rows)
        if fewer < count:
            return Coloring(others, fewer, True, others[rows] * n + columns)
    return Coloring(colors, count, False, colors[columns] * n + rows)


def column_colors(n: int, rows: np.ndarray, columns: np.ndarray, length: int = 0) -> tuple[np.ndarray, int]:
    """Colour n columns such that those of one colour share no row; return the colours, and how many.

    Parameters
    ----------
    n : int
    rows, columns : array of int
        Places of the entries.
    length : int
        Number of rows, where it is not n.

    Examples
    --------
    >>> import numpy as np
    >>> i = np.arange(5)
    >>> column_colors(6, np.concatenate([i, i, i + 1]), np.concatenate([i, i + 1, i]))[1]
    3
    """
    order = np.argsort(columns, kind="stable")
    ends = np.searchsorted(columns[order], np.arange(n + 1)).tolist()
    where = rows[order]
    weight = np.bincount(rows, minlength=1)[where]
    degree = np.bincount(columns[order], weights=weight, minlength=n)
    of_column, seen, colors = where.tolist(), [0] * (length or n), [0] * n
    for j in np.argsort(-degree, kind="stable").tolist():
        mine, used = of_column[ends[j] : ends[j + 1]], 0
        for i in mine:
            used |= seen[i]
        bit = ~used & (used + 1)
        for i in mine:
            seen[i] |= bit
        colors[j] = bit
    return _numbered(colors)


def star_colors(n: int, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, int]:
    """Star-colour the graph of a symmetric pattern, given by both entries of each edge; return colours, and how many.

    A colour is forbidden to a vertex v if a neighbour has it; if it is that of two steps away over a vertex without a
    colour yet; and over one, w, that has a colour, if another neighbour of the vertex behind has the colour of w.

    Examples
    --------
    >>> import numpy as np
    >>> leaves, hub = np.arange(1, 9), np.zeros(8, dtype=int)
    >>> star_colors(9, np.concatenate([leaves, hub]), np.concatenate([hub, leaves]))[1]
    2
    """
    off = rows != columns
    rows, columns = rows[off], columns[off]
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(n + 1)).tolist()
    neighbours = columns[order].tolist()
    degree = np.bincount(rows, minlength=n)
    graph = _Star(neighbours, ends)
    for v in np.argsort(-degree, kind="stable").tolist():
        graph.color(v)
    return _numbered(graph.colors)


class _Star:
    """A graph that is being coloured; a colour is a power of two, 0 where there is none yet."""

    def __init__(self, neighbours: list[int], ends: list[int]) -> None:
        n = len(ends) - 1
        self.neighbours, self.ends = neighbours, ends
        self.colors = [0] * n
        self.once = [0] * n  # colours among the neighbours of a vertex
        self.twice = [0] * n  # colours that two of them have
        self.behind = [0] * n  # colours of the neighbours x of w that have another neighbour in the colour of w

    def color(self, v: int) -> None:
        """Give v the first colour that it may have."""
        colors, once, twice, behind = self.colors, self.once, self.twice, self.behind
        mine, used = self.neighbours[self.ends[v] : self.ends[v + 1]], 0
        for w in mine:
            used |= (colors[w] | behind[w]) if colors[w] else once[w]
        bit = colors[v] = ~used & (used + 1)
        for x in mine:
            if not once[x] & bit:
                once[x] |= bit
                continue
            twice[x] |= bit
            if colors[x]:  # v, and who has its colour beside x, get x behind them
                for w in self.neighbours[self.ends[x] : self.ends[x + 1]]:
                    if colors[w] == bit:
                        behind[w] |= colors[x]
        if twice[v]:
            for w in mine:
                if colors[w] & twice[v]:
                    behind[w] |= bit


def _numbered(bits: list[int]) -> tuple[np.ndarray, int]:
    """Colours as numbers from 0 on, of powers of two."""
    numbers = {bit: k for k, bit in enumerate(sorted(set(bits)))}
    return np.asarray([numbers[bit] for bit in bits], dtype=np.int64), len(numbers)


def _by_star(pattern: Pattern) -> Coloring:
    """Read (i, j) in row i where j is the only neighbour of i in its colour, else in row j; both halves alike."""
    n, rows, columns = pattern.n, pattern.rows, pattern.columns
    colors, count = star_colors(n, rows, columns)
    place = rows * count + colors[columns]  # the product that shows A_ij in row i
    alone = _alone(place)
    direct, across = colors[columns] * n + rows, colors[rows] * n + columns
    mirror = pattern.by_columns
    lower = rows >= columns
    first = np.where(lower, alone, ~alone[mirror])  # the lower half chooses, the upper one follows
    return Coloring(colors, count, False, np.where(first, direct, across))


def _alone(keys: np.ndarray) -> np.ndarray:
    """Whether each key is there once."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    found: Any = counts[inverse] == 1
    return np.asarray(found)
