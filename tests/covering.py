"""Covering arrays: few cases in which every two values of two factors meet."""

from __future__ import annotations

import itertools
from typing import Any


def pairwise(whole: list[tuple[Any, ...]], *factors: list[Any]) -> list[tuple[Any, ...]]:
    """All of `whole`, one case each, with values of `factors` beside them such that any value of one factor
    meets any of another, and any value of each column of `whole`; more cases where these do not do. Greedy:
    of all combinations, the one with most new pairs (Cohen et al., The AETG system, 1997)."""
    columns = [list(dict.fromkeys(column)) for column in zip(*whole, strict=True)]
    choices = list(itertools.product(*factors))
    missing = {
        pair
        for left, right in itertools.combinations([*enumerate([*columns, *factors])], 2)
        if right[0] >= len(columns)
        for pair in itertools.product(((left[0], x) for x in left[1]), ((right[0], x) for x in right[1]))
    }

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2)) & missing

    found = []
    rows = iter(whole)
    while True:
        fixed = next(rows, None)
        if fixed is None and not missing:
            return found
        heads = [fixed] if fixed is not None else whole
        best = max(
            ((*head, *choice) for head in heads for choice in choices), key=lambda row: len(pairs(row))
        )
        missing -= pairs(best)
        found.append(best)
