"""The inverse of a matrix after a rank-one update, from the inverse before."""

import torch
from torch import Tensor

from bilevel_lite.params import dot

__all__ = ["rank_one_inverse"]


def rank_one_inverse(m: Tensor, q: Tensor, beta: float, weight: float) -> Tensor:
    r"""(beta M^-1 + weight q q^T)^-1, by Sherman and Morrison.

        M' = (1/beta) [ M - weight M q q^T M / (beta + weight q^T M q) ]

    Args:
        m: M, symmetric, shape (d, d).
        q: Shape (d,).
        beta: Above zero.
        weight: Not below zero.

    Returns:
        M', shape (d, d).

    Cost: 4 d^2 operations.
    """
    mq = m @ q
    return (m - torch.outer(mq, mq) * (weight / (beta + weight * dot(q, mq)))) / beta
