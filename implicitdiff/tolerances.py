"""Every number against which something is judged, each with the reason for its value.

They are relative, and mean the same in any units. Those that depend on the precision of the numbers are `ByPrecision`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ByPrecision", "is_double"]


def is_double(eps: float) -> bool:
    """Whether numbers of that machine epsilon have the 16 digits of double precision."""
    return eps < 1e-10


class ByPrecision(NamedTuple):
    """A number for double and for single precision."""

    double: float
    single: float

    def at(self, xp: Any, dtype: Any) -> float:
        """Return the one for a dtype."""
        return self.of(float(xp.finfo(dtype).eps))

    def of(self, eps: float) -> float:
        """Return the one for a machine epsilon."""
        return self.double if is_double(eps) else self.single


# -- the accuracy of A -----------------------------------------------------------------------------------
ROUNDING, ROUNDING_LEAST = 0.25, 0.05
"""Part of the machine epsilon that counts as the error of an entry of A, of which √n average; and the least of A's."""
NOISY_PRODUCTS = 1e-9
"""Relative error of products from which A is assembled: rounding does not explain it."""
NOISY_DIFFERENCES = 1e-8
"""The same of differences, which are then taken again at other steps: their own estimate of it is up to tenfold."""
LOST = 0.03
"""Estimated relative error of a solution, by that of A, from which A is called singular: no digit can be relied on."""
UNCERTAIN = 2.5e-3
"""The same error, from which it is told. It is what is usual, and one percent is four times that: at 3.9e-3, three of
4 500 results in single precision at condition numbers from 1e3 on were off by more in silence."""
DOUBTFUL, TELLING, USELESS = 1e-4, 3e-3, 0.1
"""Estimated relative errors of a result by differences: to be looked at, to be told, and from which none is given."""
ALONG = 1e-2
"""Part of a solution along the weakest direction from which it is none of a singular, consistent system."""
SKEW = ByPrecision(1e-5, 1e-3)
"""Asymmetry up to which a matrix counts as symmetric: noise of finite differences passes."""
SKEW_SEEN = ByPrecision(1e-6, 1e-3)
"""The same on one vector, beside the residual, where only products are known: they are exact, or rounded."""

MISSED = ByPrecision(1e-9, 1e-4)
"""Part of a row, in the units of its columns, that a sparsity pattern may leave out: a product that cancels rounds."""

# -- linear solves ---------------------------------------------------------------------------------------
RESIDUAL = ByPrecision(1e-10, 1e-5)
"""‖b − A x‖ / ‖b‖ at which an iterative method stops: six digits to spare from rounding in double, two in single."""
RESIDUAL_OF_OTHERS = ByPrecision(1e-8, 1e-4)
"""Up to which the solution is accepted of a method that does not judge its own, or is made of two systems."""
RESIDUAL_ON_SUPPORT = ByPrecision(1e-10, 1e-6)
"""Of the whole system, where a part of it was solved; times a hundred, since the rest adds rounding of its own."""
LOOSE, LOOSE_ITERATIONS = 1e-2, 100
"""Residual and iterations of a solution of which one or two digits are needed."""
WELL_CONDITIONED = 1e12
"""Times the machine epsilon: rcond from which a direct method is held to a hundred roundings over that, 1e-10."""
NOISE_LEFT = 1e-2
"""Most that noise of products may raise the tolerance of an iterative method to: beyond, it says nothing."""
NULL_VECTOR = ByPrecision(2 * (2.0**-52) ** 0.5, 0.5 * (2.0**-23) ** 0.7)
"""‖A r‖ / (‖A‖ ‖r‖) of MINRES at which r is a null vector: lost orthogonality keeps it above about sqrt(eps)."""
MARGIN = 1e-2
"""What is added to the damping that makes the least eigenvalue zero, relative to it; beside √ε ‖A‖."""
LEAST_SQUARES = ByPrecision(1e-12, 3e-6)
"""‖Aᵀ r‖ / (‖A‖ ‖r‖) up to which r is orthogonal to the range of A: well above rounding, and below the least singular
value of a matrix that still counts as regular."""
LEAST_NORM = ByPrecision(1e-6, 1e-2)
"""Part of y in the null space of A, relative to y, up to which y is the solution of least norm, and change of A up to
which F is linear in y: as well as solvers that began at zero leave it."""
PROJECTOR = ByPrecision(1e-9, 1e-4)
"""Relative difference of D D z and D z up to which D is a projection: some roundings of two products."""
KEPT_IN_NULL_SPACE = 0.5
"""Part of the difference of two solutions that a second round leaves, from which it lies in the null space: of a
regular A the tolerance of the solve is left of it, of a singular one all."""

# -- units -----------------------------------------------------------------------------------------------
EVEN = 1.25
"""Ratio of the sums of two rows up to which they are of one size. More is not asked for: with some patterns of zeros it
is reached in the limit only, in which the other entries of a row come to nothing."""
ALIKE = 3
"""Powers of two between rows that count as the same unit: such a system is left as it is."""
MIXED = ByPrecision(1e4, 1e2)
"""Ratio of entries that seem to be in units of their own: squared, times the tolerance of the iterative methods, it is
one percent."""
ENERGY_NOISE = 1e-12
"""Part of the other coordinates' energy below which that between one of them and a flat one is rounding."""
UNITS_APART = 1e-3
"""Ratio below which two sizes are not taken for one."""
STEPS_APART = 2.0**13
"""Ratio of entries from which on the steps of a proximal gradient seem to be in units of their own."""
STEP_FAR = 2.0**10
"""Factor by which a step that is given may be off."""
STEP_SUITS = 1e-4
"""Relative error up to which a step for each coordinate reproduces y, and commutes with D."""

# -- y as a solution ---------------------------------------------------------------------------------------
STEP_OF_COORDINATE = ByPrecision(2e-5, 1e-3)
"""Newton step, against the coordinate, that is told: what optimisers leave at their default tolerances is less."""
STEP_OF_VECTOR = ByPrecision(3e-7, 3e-5)
"""The same against the largest coordinate, below which entries that happen to be tiny raise no alarm."""
FAR = 0.1
"""A step above this part of y, in the largest coordinate, is far: NaN where nothing can be told."""
ALIKE_ALONG = 0.05
"""Relative error up to which F changes along a part of the step as A says: noise and curvature leave that much."""
SAFETY = 30
"""How much larger than the rounding that was seen once, rounding may be."""
SLACK = 0.1
"""How much smaller than seen on one right-hand side the least singular value may be."""

# -- constraints -----------------------------------------------------------------------------------------
ACTIVE = ByPrecision(1e-6, 3e-4)
"""Distance, or multiplier, that counts as zero, in its unit: what solvers of programs leave is less."""
VIOLATED = ByPrecision(1e-4, 1e-2)
"""Distance that counts as a violation."""
DEPENDENT_ROWS = ByPrecision(1e-12, 1e-6)
"""Reciprocal condition number of the least-squares system of sparse gradients, of the order of their least singular
value squared, from which they are dependent."""
DEPENDENT = 1e-4
"""Part of a vector in the null space of the gradients of active constraints from which they are dependent."""

# -- what users give of derivatives ----------------------------------------------------------------------
MISTAKE = 1e-2
"""Relative difference that is no mistake: what users' own approximations by differences come to is less."""
MISTAKE_OF_PRODUCT = ByPrecision(1e-3, 1e-2)
"""The same of two products, where no difference is taken."""
MISTAKE_TRACED = 0.03
"""The same in a compiled program, where a step cannot be tried again."""
STEP_TRACED = ByPrecision(2e-5, 5e-3)
"""Relative step of the difference there: about the cube root of the machine epsilon, where rounding meets curvature."""
AWAY = ByPrecision(1e-2, 0.1)
"""How far from a stationary point, in its units, ∇f is looked at where it is not zero."""
UNKNOWN = 0.5
"""A comparison that allows more than this says nothing."""
NEARBY = 1e-2
"""Part of its size by which a coordinate is moved aside: off what happens to be zero there, and near."""
UNITS_OF_ZERO = (1.0, *(10.0**k for each in (6, 12, 18, 24) for k in (each, -each)))
"""What a coordinate that is 0 is taken for, one after another: nothing says in what unit it is. A function that is
smooth shows what it depends on over some seven decades in single precision, over twice as many in double."""

# -- differences -------------------------------------------------------------------------------------------
AIM = 1e-9
"""Relative error of a difference at which no other step is tried: what five values give of a smooth function."""
AIM_OF_FINE = 1e-13
"""The same where nine values are there to show the error of five."""
CAUTION = 30
"""Factor of what truncation of those seems to be: a step shorter by 0.7 takes that away, and adds half of the noise."""
AIM_OF_WHOLE = 1e-13
"""The same against the largest derivative, below which rounding of a sum leaves nothing."""
REFINED = 1e-3
"""Relative error from which another step is worth its values, even beyond the natural length."""
VISIBLE = 10
"""A function moves where it moves by so many times its noise."""
NOISE_SHOWN = 1e-2
"""Noise against a change by a coordinate's own size, from which it says nothing of that size."""
AGREES = 1e-6
"""Relative difference, beside ten times the errors, of two ways to one derivative, or steps, that agree."""
KINK = 1e-2
"""Part of the rate of change that two formulas of second order differ by, from which there is a kink."""
SHRUNK = 1e-2
"""Part of the usual step below which a step was shortened for some reason, and tells nothing of a unit."""
OFF = 1e4
"""Ratio of curvatures from which the size that a zero was lent is taken for wrong."""
TOGETHER = 1e-3
"""Entries of a direction within this factor of the largest are moved by one difference."""
RESTLESS = 1e-7
"""Noise against the change over the shortest distance, from which still shorter ones are looked at."""
COMPLEX_STEP = 1e-20
"""Step relative to the size of a coordinate; its square is far below rounding."""

# -- orders ----------------------------------------------------------------------------------------------
SMALL = 256
"""Up to this order a matrix may be assembled: no more products than an iterative method may need."""
TINY = 32
"""Up to this order it is, where values are not seen."""
PATIENCE = 500
"""Iterations of a method that is tried first, of an operator that is too large to be assembled at that price."""
DENSE = 4096
"""Up to this order a matrix is factored after an iterative method failed, or looked at as a whole: 134 MB."""
FACTORED = 128
"""Up to this order a matrix at hand is factored beside an iterative method: less work than the iterations are."""
LARGEST = 2**33
"""Bytes of a Jacobian of constraints that is still made."""
EXACT_ASSEMBLY = 1024
"""Up to this order a missing product is assembled from its exact transpose rather than differenced."""

# -- estimated errors and polish -------------------------------------------------------------------------
ESTIMATED = 0.03, 0.3
"""Residual of the systems of an estimate: the one, or the other over κ(A).

0.1 alone left smooth components of ill-conditioned systems out: on 23 problems 92 to 95 % were within a factor
of three; with these 100 %."""
CAUTIOUS = 0.01
"""The same where κ is not known."""
MOST_RESOLVED = 4
"""Further digits of a correction that the derivative does not see at first. With κ(A) = 5, CG's residuals from 1e-2 to
1e-5, and a loss along B, estimates were 0 without them, and are within a factor of two of errors from 2e-5 to 6e-11."""
CERTIFIED = 0.25
"""‖F‖ after a Newton step over ‖F‖ before it, up to which an estimate is trusted: 98.5 of 100 were right then."""
CONTRACTING, MOST_POLISH = 0.5, 20
"""The same, above which polishing gets nowhere; and steps by which Newton's method that contracts at all is done."""
PROBES = 4
"""Random directions for a Jacobian whose A is not factored: within a factor of three in 98 of 100 cases at rank one."""
SPLIT = 0.03
"""Part of the residual from which on what is the linear solve's is solved for by itself."""
ROUNDED = 30
"""How many times larger than one rounding a residual may be that counts as all rounding."""
ANOTHER_STEP = 2**0.25
"""Ratio of steps at which the change of a difference of fourth order is its error."""
SHORTER = 0.7
"""Ratio of steps of a second opinion: noise is drawn anew, and truncation is a quarter."""
NOISE = 3
"""How many times larger F may be than the error of differences in it, and not be told from that."""

# -- quadratic programs that are solved here -----------------------------------------------------------------
SEMIDEFINITE = 1e-10
"""Negative part of an eigenvalue of Q, beside its largest entry, that counts as rounding of a semidefinite one."""
STRICTLY_CONVEX = 1e-6
"""Pivot of Q, beside its largest entry, from which Q is inverted: what that loses is made good by refinement."""
POLISHED, UNPOLISHED = 1e-10, 1e-6
"""Residual of the conditions of a polished solution, beside the sums that it is the rest of; and of one that is as
Clarabel found it, whose products of multipliers and distances are 1e-8."""
ROUNDED_LENGTH = 1e-13
"""Distance that is rounding beside data of the size one: hundreds of units of the last place."""
POLISHING, POLISHING_STEPS = 2.0**-26, 8
"""What the system of the active set is regularised by, half of the digits, so that a step of refinement gains as many;
and the most steps of it, and of moving the active set."""

# -- loops -----------------------------------------------------------------------------------------------
SMALLEST_STEP = 1e-4
"""Part of a Newton step below which none lowers ‖F‖."""
FORGOTTEN = 0.5
"""Part of what an estimate was wrong by once that is remembered when it is seen anew."""
OVERSHOT = 0.9
"""Slope at the end of a step, against that at its start, from which it went too far."""
DAMPED, RAISED, EASED = 3e-2, 4.0, 0.25
"""At negative curvature: the first damping against the curvature along the right-hand side; the factor of one that was
too small; and of one that served."""
UNDAMPED = 1e-4
"""Part of its residual that a damping may leave of a system that counts as solved without."""
CONSISTENT = 1e-6
"""Relative error of a gradient that a line search may hold against values."""

# -- approximations --------------------------------------------------------------------------------------
POWER, POWER_CHANGE = 30, 1e-3
"""Turns of a power iteration at most, and the relative change of the eigenvalue at which it is done: it is known to a
few percent then, and half of it would do."""
GROWTH = ByPrecision(1e8, 3e3)
"""How many times larger than at its start a residual may become (with BiCGSTAB: in one step): beyond, half the digits
of x are lost; at the square of it, all."""
POWER_SHORT = 0.05
"""How far below the largest eigenvalue a power iteration may have stopped, where a bound has to hold."""
RANK = 1e-10
"""Eigenvalue of a sketch, against its largest, below which it is none."""
