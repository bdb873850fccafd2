"""Small convex problems on Gramians, solved exactly in float64: pure functions of numpy arrays.

Gradients enter as their norms ``n`` and cosines ``C`` (``G = diag(n) C diag(n)``), and solutions leave as coefficients
``y`` of the *unit* gradients, ``w = y / n``: what is solved is then as well scaled as the directions allow, however far
the scales of the tasks are apart. numpy, because a call on a 2 × 2 matrix costs 1 to 5 µs in it and two to three times
that in torch, and since nothing here gains from a GPU.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

EPS = float(np.finfo(np.float64).eps)
#: Added to the unit diagonal, so that solutions are unique where gradients are dependent (those of least norm, nearly).
#: It gives up what gradients span only at an angle below 1e-6 of each other; rounding of G itself hides angles of 1e-8.
RIDGE = 1e-12
_STATIONARY = 1e-6  # a convex combination this short, beside the shortest gradient, counts as zero
_BLOCK = 2**18  # entries of all systems that are solved at once
_TOLERANCE = 1e-10  # of signs, beside the largest entry
_EXCHANGES = 8  # rounds in which all that is wrong is exchanged
_SHIFTS = tuple(0.05 / 1.6**i for i in range(14))  # of the diagonal, in the rounds after these


def positive_definite(cosine: Array) -> Array:
    """The matrix plus ``RIDGE``; before, the nearest semidefinite one where estimates have made it indefinite."""
    shifted: Array = cosine.copy()
    shifted.ravel()[:: len(shifted) + 1] += RIDGE
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cosine)
        shifted = np.asarray((vectors * (values.clip(0.0) + RIDGE)) @ vectors.T)
    return shifted


def nonnegative_qp(matrix: Array, linear: Array, guess: Mask | None = None) -> Array:
    """``argmin ½ zᵀ A z − bᵀ z`` over ``z ≥ 0`` for every row ``b`` of ``linear``.

    Block principal pivoting (Júdice & Pires, 1994; for many right-hand sides Kim & Park, 2011): guess which entries are
    positive, solve for those, exchange the entries that contradict the guess, repeat; one or two rounds are usual. All
    problems advance at once. Exchanging everything may cycle, as it does where more entries are guessed than there are
    independent ones. So after some rounds the guess is led there by easier problems, with ever less added to the
    diagonal; and what that does not solve is solved from scratch, slowly but surely (:func:`_descended`). The numbers
    of rounds and the shifts are our choice. ``csrc/cpu/dual_cone.cpp`` does the same.

    Args:
        matrix: ``A``, positive definite with entries of order 1, ``[T, T]``.
        linear: ``b`` of ``K`` problems, ``[K, T]``.
        guess: Which entries are probably positive, ``[K, T]``; None for where ``linear`` is.

    Returns:
        ``[K, T]``.
    """
    passive = linear > 0.0 if guess is None else guess.copy()
    solution = np.zeros_like(linear)
    todo = np.arange(len(linear))
    for shift in (0.0,) * _EXCHANGES + _SHIFTS + (0.0,) * _EXCHANGES:
        tried = passive[todo]
        found = _solved_on(matrix, linear[todo], tried, shift)
        slack = np.where(tried, found, found @ matrix - linear[todo])
        if not shift:
            solution[todo] = np.maximum(found, 0.0)
            if slack.min() >= 0.0:
                return solution
        wrong = slack < -_TOLERANCE * (1.0 + np.abs(found).max(1, keepdims=True))
        if not shift:
            left = wrong.any(1)
            if not left.any():
                return solution
            todo, wrong = todo[left], wrong[left]
        passive[todo] ^= wrong
    for problem in todo:
        solution[problem] = _descended(matrix, linear[problem])
    return solution


def _descended(matrix: Array, linear: Array) -> Array:
    """One problem by the method of Lawson & Hanson (1974), which never leaves ``z ≥ 0`` and never rises."""
    solution, passive = np.zeros_like(linear), np.zeros(len(linear), dtype=bool)
    for _ in range(20 * len(linear)):
        slack = np.where(passive, 0.0, matrix @ solution - linear)
        if slack.min() >= -_TOLERANCE * (1.0 + solution.max()):
            break
        passive[slack.argmin()] = True
        while True:
            found = _solved_on(matrix, linear[None], passive[None], 0.0)[0]
            ending = np.flatnonzero(found < 0.0)
            if not len(ending):
                break
            fractions = solution[ending] / (solution[ending] - found[ending])
            solution += fractions.min() * (found - solution)
            passive[ending[fractions.argmin()]] = False
            solution *= passive
        solution = found
    return solution


def _solved_on(matrix: Array, linear: Array, passive: Mask, shift: float) -> Array:
    """Solve every problem on its passive entries, the others being zero, with ``shift`` added to the diagonal.

    All are brought to one size, filled up by the identity.
    """
    result = np.zeros_like(linear)
    if len(linear) == 1:  # nothing to fill up
        inside = np.flatnonzero(passive[0])
        block = matrix[inside[:, None], inside]
        block.ravel()[:: len(inside) + 1] += shift
        result[0, inside] = np.linalg.solve(block, linear[0, inside])
        return result
    most = max(1, _BLOCK // matrix.size)
    if len(linear) > most:
        parts = [slice(i, i + most) for i in range(0, len(linear), most)]
        return np.concatenate([_solved_on(matrix, linear[part], passive[part], shift) for part in parts])
    size = int(passive.sum(1).max())
    index = np.argsort(~passive, axis=1, kind="stable")[:, :size]
    rows = np.arange(len(linear))[:, None]
    outside = ~passive[rows, index]
    blocks = matrix[index[:, :, None], index[:, None, :]]
    blocks.reshape(len(linear), -1)[:, :: size + 1] += shift
    targets = linear[rows, index]
    if outside.any():
        blocks[outside] = 0.0
        blocks.transpose(0, 2, 1)[outside] = 0.0
        blocks.reshape(len(linear), -1)[:, :: size + 1] += outside
        targets[outside] = 0.0
    result[rows, index] = np.linalg.solve(blocks, targets[:, :, None])[:, :, 0]
    return result


def dual_cone(cosine: Array, targets: Array) -> Array:
    """Project combinations of the gradients onto the cone of directions that agree with all of them.

    Args:
        cosine: ``[T, T]``.
        targets: Coefficients of ``K`` combinations, ``[K, T]``.

    Returns:
        ``argmin yᵀ C y`` over ``y ≥ target``, ``[K, T]``.
    """
    slopes = targets @ cosine
    if slopes.min() >= 0.0:  # no conflict, nothing to solve
        return targets
    return targets + nonnegative_qp(positive_definite(cosine), -slopes)


def vanishes(cosine: Array, units: Array) -> bool:
    """Whether a combination of the unit gradients is no longer than ``RIDGE`` alone would leave it.

    Args:
        cosine: ``[T, T]``.
        units: Its coefficients, as :func:`dual_cone` finds them, ``[T]``.
    """
    return bool(units @ cosine @ units <= 4.0 * RIDGE * (units @ units))


def shortest(norms: Array, cosine: Array) -> Array:
    """Weights of the shortest convex combination, ``argmin wᵀ G w`` over the simplex (Wolfe's point of least norm).

    ``v = argmin ½ vᵀ (G + ρ² 1 1ᵀ) v − ρ² 1ᵀ v`` over ``v ≥ 0`` satisfies the same conditions up to its sum for any
    ``ρ``, and is bounded also where that combination is zero. With ``ρ`` the least norm it is well scaled.

    Args:
        norms: Norms ``n > 0``, ``[T]``.
        cosine: ``[T, T]``.

    Returns:
        ``[T]``, ``w ≥ 0`` with ``Σ w = 1``.
    """
    relative = norms.min() / norms
    units = nonnegative_qp(positive_definite(cosine) + relative[:, None] * relative, relative[None])[0]
    weights: Array = units * relative
    return weights / float(weights.sum())


def worst_case_step(norms: Array, cosine: Array, start: Array, radius: float) -> Array:
    """The step from a start to ``argmax_d min_i g_i·d`` over a ball around it, of a radius relative to its length.

    By duality the step is ``Σ y_i u_i`` of the unit gradients with ``y ≥ 0``: the shortest that gets to the slope
    ``g_i·d ≥ τ`` everywhere, with the greatest ``τ`` that the radius allows. For given ``τ`` that is a non-negative
    quadratic program. Its length grows with ``τ``, and while the same entries are positive it is the root of a
    quadratic: so Newton's method in ``τ``, kept in a bracket.

    Where a convex combination of the gradients vanishes, ``τ ≤ 0`` and ``d`` is not unique: that nearest the start.

    Args:
        norms: Norms ``n > 0``, ``[T]``.
        cosine: ``[T, T]``.
        start: Coefficients of the unit gradients in the start, ``[T]``.
        radius: Of the ball, not negative.

    Returns:
        ``y``, ``[T]``.
    """
    slopes = cosine @ start
    length = np.sqrt(max(float(start @ slopes), 0.0))
    if radius == 0.0 or length <= np.sqrt(EPS) * np.abs(start).sum():
        return np.zeros_like(start)
    relative, slopes, matrix = norms.min() / norms, slopes / length, positive_definite(cosine)
    weights = shortest(norms, cosine) / relative
    stationary = weights @ cosine @ weights <= _STATIONARY**2
    low, high = float((slopes / relative).min()), 0.0 if stationary else 1.0 + radius
    step, slope = np.zeros_like(start), high
    for _ in range(100):
        linear = slope * relative - slopes
        step = nonnegative_qp(matrix, linear[None], None if slope == high else step[None] > 0.0)[0]
        excess = np.sqrt(max(float(step @ linear), 0.0)) - radius
        if abs(excess) <= 1e-13 * radius or (excess < 0.0 and slope == high):
            break
        low, high = (slope, high) if excess < 0.0 else (low, slope)
        previous, slope = slope, _root(matrix, relative, slopes, step > 0.0, radius)
        if not low < slope < high:
            slope = (low + high) / 2.0
        if slope == previous:
            break
    return step * float(length)


def _root(matrix: Array, relative: Array, slopes: Array, passive: Mask, radius: float) -> float:
    """The larger ``τ`` at which the step on these entries, ``A⁻¹ (τ a - h)``, has that length; NaN if there is none."""
    columns = np.stack([relative, slopes], 1)[passive]
    aa, ah, _, hh = (columns.T @ np.linalg.solve(matrix[np.ix_(passive, passive)], columns)).ravel()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((ah + np.sqrt(ah * ah - aa * (hh - radius * radius))) / aa)


def bargain(cosine: Array, gains: Array, power: float) -> Array:
    """The positive ``y`` with ``(C y)_i = gains_i y_i^-power``, by Newton's method with a line search.

    The convex ``½ yᵀ C y - Σ gains_i ψ(y_i)`` with ``ψ' = y^-power`` is least there. Where a convex combination of the
    gradients vanishes there is none; ``RIDGE`` then bounds the answer, whose combination is nearly zero.

    Args:
        cosine: ``[T, T]``.
        gains: Positive, ``[T]``.
        power: ``> 0``.

    Returns:
        ``[T]``.
    """
    matrix = positive_definite(cosine)
    # Work on z, which is 1 for orthogonal gradients: y = scale · z, with the right-hand side scale · z^-power.
    scale = gains ** (1.0 / (1.0 + power))
    largest = float(scale.max())
    scale = scale / largest

    def value(z: Array) -> float:
        utility = np.log(z) if power == 1.0 else (z ** (1.0 - power) - 1.0) / (1.0 - power)
        y = scale * z
        return float(0.5 * y @ matrix @ y - scale**2 @ utility)

    z = np.full_like(scale, float(scale @ scale / (scale @ matrix @ scale)) ** (1.0 / (1.0 + power)))
    now = value(z)
    for _ in range(100):
        wanted = scale * z**-power
        residual = wanted - matrix @ (scale * z)
        if (np.abs(residual) <= 4.0 * EPS * (wanted + np.abs(matrix) @ (scale * z))).all():
            break
        hessian = matrix + np.diag(power * z ** (-power - 1.0))
        move = np.linalg.solve(hessian, residual) / scale
        gain = float(residual @ (scale * move))
        fraction = min(1.0, 0.9 / max(float((-move / z).max()), 0.9))
        enough = now + 1e-14 * abs(now)  # what rounding may hide
        while (then := value(z + fraction * move)) > enough - 1e-4 * fraction * gain and fraction > 1e-10:
            fraction /= 2.0
        z, now = z + fraction * move, then
    return largest * scale * z


def equal_slopes(cosine: Array) -> Array:
    """The combination of unit gradients with slope 1 along each of them, ``C⁺ 1``.

    Eigenvalues below ``T`` epsilons of the largest count as zero. Where gradients are dependent, the slopes are equal
    in the least-squares sense and the coefficients those of least norm; all are 0 where that combination vanishes.

    Args:
        cosine: ``[T, T]``.

    Returns:
        ``[T]``.
    """
    values, vectors = np.linalg.eigh(cosine)
    negligible = len(cosine) * EPS
    used = values > negligible * values[-1]
    parts = np.where(used, vectors.sum(0), 0.0)
    inverse = parts / np.where(used, values, 1.0)
    units: Array = vectors @ inverse
    return units if parts @ inverse > negligible else np.zeros_like(units)
