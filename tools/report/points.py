"""Curves of many points, made fit to be drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Point = tuple[float, float]

MEAN_OF = 1 / 40  # of a curve's points, in each point of its running mean


def thin(points: list[Point], limit: int) -> list[Point]:
    """At most `limit` of the points: lowest and highest of stretches of equal length, so that no peak is lost."""
    if len(points) <= limit:
        return points
    kept = []
    edges = np.linspace(0, len(points), limit // 2 + 1).round().astype(int).tolist()
    for start, end in pairwise(edges):
        stretch = points[start:end]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def running_mean(points: list[Point]) -> list[Point]:
    """Each value as the mean of those around it, fewer at the ends."""
    if not points:
        return []
    values = np.array([value for _, value in points])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    reach = max(1, round(len(values) * MEAN_OF / 2))
    positions = np.arange(len(values))
    starts, ends = np.maximum(positions - reach, 0), np.minimum(positions + reach + 1, len(values))
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(number, float(mean)) for (number, _), mean in zip(points, means, strict=True)]
