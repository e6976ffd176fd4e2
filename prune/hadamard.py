"""Orthogonal matrices with entries of equal magnitude: Hadamard matrices where they exist, else close to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """An orthogonal (size, size) matrix, float64, that spreads every channel over all others.

    Sylvester's doubling of a Paley matrix of the smallest order that fits; where there is none (172 = 4 × 43), the
    odd part is a cosine transform (DCT-II), whose entries are at most √2 times as large.
    """
    odd, doublings = size, 0
    while odd % 2 == 0:
        odd, doublings = odd // 2, doublings + 1
    if odd == 1:
        core, used = torch.ones(1, 1, dtype=torch.float64), 0
    else:
        for used in range(2, doublings + 1):
            paley = _paley(odd << used)
            if paley is not None:
                core = paley
                break
        else:
            core, used = _cosines(odd), 0
    matrix = core
    for _ in range(doublings - used):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


def _paley(order: int) -> Tensor | None:
    """Paley's construction of an orthogonal ±1/√order matrix from a prime field; None where neither form exists."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        q = _jacobsthal(order - 1)
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, q
        return (skew + torch.eye(order, dtype=torch.float64)) / math.sqrt(order)
    half = order // 2
    if order % 4 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        q = _jacobsthal(half - 1)
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, q
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(half, dtype=torch.float64)
        return (torch.kron(conference, ones) + torch.kron(eye, other)) / math.sqrt(order)
    return None


def _jacobsthal(prime: int) -> Tensor:
    """(prime, prime) Jacobsthal matrix: 1 where row − column is a square modulo `prime`, −1 where not, 0 if it is 0."""
    squares = {number * number % prime for number in range(1, prime)}
    signs = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, prime)], dtype=torch.float64)
    numbers = torch.arange(prime)
    return signs[(numbers[:, None] - numbers[None, :]) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _cosines(size: int) -> Tensor:
    numbers = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (numbers[:, None] + 0.5) * numbers[None, :]) * math.sqrt(2 / size)
    matrix[:, 0] = 1 / math.sqrt(size)
    return matrix
