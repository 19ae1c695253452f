"""Which dimensions of a reshape depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

Groups = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""Dimensions (before, after) of a reshape that depend on each other alone."""


def regroup(source: Sequence[int], target: Sequence[int]) -> Groups:
    """Finest independent groups of dimensions of a row-major reshape, as (in dims, out dims).

    [2, 256, 64] -> [2, 256, 4, 16] gives ((0,),(0,)), ((1,),(1,)), ((2,),(2,3)). Sizes of 1 pair up
    where both sides have one and stand alone otherwise. Sizes that depend on the data match their
    like; what can't be matched is one group.
    """
    groups: Groups = []
    i = j = 0
    while i < len(source) or j < len(target):
        if i == len(source) or (j < len(target) and target[j] == 1 != source[i]):
            groups.append(((), (j,)))
            j += 1
            continue
        if j == len(target) or (source[i] == 1 != target[j]):
            groups.append(((i,), ()))
            i += 1
            continue
        a, b, left, right = i + 1, j + 1, source[i], target[j]
        while left != right:
            if a == len(source) if left < right else b == len(target):
                a, b = len(source), len(target)
                break
            if left < right:
                left *= source[a]
                a += 1
            else:
                right *= target[b]
                b += 1
        groups.append((tuple(range(i, a)), tuple(range(j, b))))
        i, j = a, b
    return groups
