"""The largest eigenvalues and the trace of an objective's Hessian."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from composer_sassha.common import validate
from composer_sassha.common.rng import generator
from composer_sassha.common.tensors import flatten
from composer_sassha.curvature.probes import rademacher
from composer_sassha.sharpness.objective import Objective, wide_like

Product = Callable[[Tensor], Tensor]
T = TypeVar("T")

_RESTARTS = 50  # of ARPACK; eigenvalues that have not converged by then will not converge


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error (their deviation over the root of their number)."""

    mean: float
    error: float


class Eigenpairs(NamedTuple):
    """The largest eigenvalues, in descending order [k], and their unit vectors [k, size]."""

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]


def led(objective: Objective, solve: Callable[[Product], T]) -> T:
    """Run `solve` on rank 0, compute its Hessian products on all ranks, and broadcast its result.

    A solver stops by its own arithmetic, which may differ in the last bit between machines. If every rank ran
    it, one could stop earlier and leave the others waiting in a collective.

    Args:
        objective: its products are those that `solve` may ask for.
        solve: called on rank 0 with the product; all ranks get its result. It must raise only what the
            product raises, which all ranks raise together. Any other exception would end rank 0 alone.
    """
    ranks = objective.ranks
    if not ranks.several:
        return solve(objective.product)
    # What rank 0 broadcasts: a vector, and a last entry that is 0 when the solver has finished.
    order = wide_like(objective).new_zeros(objective.size + 1)

    def product(vector: Tensor) -> Tensor:
        order[:-1], order[-1] = vector, 1.0
        ranks.broadcast_(order)
        return objective.product(vector)

    answer: list[T | None] = [None]
    if ranks.rank == 0:
        answer = [solve(product)]
        order.zero_()
        ranks.broadcast_(order)
    else:
        while True:  # serve rank 0's products until it has finished
            ranks.broadcast_(order)
            if not order[-1]:
                break
            objective.product(order[:-1].clone())
    ranks.broadcast_objects_(answer)
    return cast(T, answer[0])


def top_eigenpairs(objective: Objective, k: int = 5, tol: float = 1e-3, seed: int = 0) -> Eigenpairs:
    """Return the k largest eigenvalues of the Hessian, by SciPy's `eigsh` (implicitly restarted Lanczos).

    These are the algebraically largest, not those of the largest magnitude: at a minimum the Hessian has few
    negative eigenvalues, and they are small. Products are computed in the dtype of the parameters, all else
    in float64.

    Args:
        objective: has the Hessian.
        k: the number of eigenvalues, >= 1; if the Hessian has fewer, all of them.
        tol: largest relative error of an eigenvalue, as far as the products are exact (the norm of a residual
            bounds the error), > 0. Eigenvalues that miss it after 50 restarts, such as a zero, may be left
            out. Default: 1e-3.
        seed: determines the first vector of the iteration. Default: 0.

    Raises:
        SettingError: an operation of the model has no second derivative.
        Unfinished: a product is not finite, or the time is over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> objective = Objective(
        ...     {"w": w}, lambda x: (x * w**2).sum() / 2, [(torch.tensor([1.0, 5.0, 3.0]), 1)]
        ... )
        >>> top_eigenpairs(objective, k=2).values
        array([5., 3.])
    """
    _check(k, tol)
    return led(objective, lambda product: _top(product, objective, k, tol, seed))


def top_eigenvalues(
    objective: Objective, k: int = 5, tol: float = 1e-3, seed: int = 0
) -> NDArray[np.float64]:
    """Return the k largest eigenvalues alone; see `top_eigenpairs`."""
    _check(k, tol)
    return led(objective, lambda product: _top(product, objective, k, tol, seed).values)


def _check(k: int, tol: float) -> None:
    validate.integer("sharpness", "eigenvalues", k, low=1)
    validate.number("sharpness", "tol", tol, low=1e-15)


def _top(product: Product, objective: Objective, k: int, tol: float, seed: int) -> Eigenpairs:
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    like, size = wide_like(objective), objective.size

    def times(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return product(torch.from_numpy(vector.ravel().copy()).to(like)).double().cpu().numpy()

    basis = min(size, max(2 * k + 1, 20))
    if size <= basis:  # the Lanczos basis would be the whole space
        matrix = np.stack([times(column) for column in np.eye(size)])
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    else:
        start = torch.randn(size, generator=generator((seed, size), torch.device("cpu")), dtype=torch.float64)
        operator = LinearOperator((size, size), matvec=times, dtype=np.float64)
        try:
            values, vectors = eigsh(
                operator, k, which="LA", v0=start.numpy(), ncv=basis, maxiter=_RESTARTS, tol=tol
            )
        except ArpackNoConvergence as error:
            values, vectors = error.eigenvalues, error.eigenvectors
        except ArpackError:  # the Hessian is zero
            values, vectors = np.zeros(0), np.zeros((size, 0))
    order = np.argsort(values)[::-1][:k]
    return Eigenpairs(values[order], vectors[:, order].T.copy())


def trace(objective: Objective, samples: int = 32, seed: int = 0) -> Estimate:
    """Estimate the trace as the mean of `z . H z` over Rademacher vectors z (Hutchinson 1990).

    The estimate is unbiased; its variance is the sum of `2 H_ij^2` over i != j, divided by `samples`.

    Args:
        objective: has the Hessian.
        samples: the number of vectors, >= 2; one product each. Default: 32.
        seed: determines the vectors. Default: 0.

    Raises:
        SettingError: an operation of the model has no second derivative.
        Unfinished: a product is not finite, or the time is over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> trace(Objective({"w": w}, lambda x: (x * w**2).sum(), [(torch.tensor([1.0, 3.0]), 1)]), samples=2)
        Estimate(mean=8.0, error=0.0)
    """
    validate.integer("sharpness", "trace_samples", samples, low=2)
    found = []
    for sample in range(samples):
        z = flatten(rademacher(objective.params, (seed, sample)), like=objective.params)
        found.append(torch.dot(z.double(), objective.product(z).double()).item())
    return estimate(found)


def estimate(draws: list[float]) -> Estimate:
    """Return the mean of at least two draws, and its standard error."""
    return Estimate(float(np.mean(draws)), float(np.std(draws, ddof=1) / len(draws) ** 0.5))
