"""The mean and the quantiles of many resamples at once.

A resample is a weight, how often it was drawn, for each row (a pair of requests). A row has any number of values: one
TTFT, or a gap for each event. A resample's quantile is not looked up but follows from the share of its values up to the
whole sample's quantile Q̂(p), which is smooth in the weights where the quantile itself jumps from value to value:

    log Q*(p) = log Q̂(p) + s(p) · (share of values ≤ Q̂(p), in the whole sample − in the resample)

with s = d log Q̂ / dp over the bandwidth of Hall and Sheather 1988. That is Bahadur's representation, resampled: the
bootstrap of an estimating function (Hu and Kalbfleisch 2000). Looking quantiles up counts every jump as spread, and so
gives wider bounds than there need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sample:
    """`figures` are the mean, then each quantile."""

    figures: Floats  # [1 + quantiles]
    slopes: Floats  # [quantiles], d log Q / dp
    sums: Floats  # [rows]
    sizes: Floats  # [rows], values of each
    below: Floats  # [rows, quantiles], values of each that are at most the whole sample's quantile
    tails: Groups  # [quantiles], rows with a value at the quantile or beyond

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], quantiles: Sequence[float]) -> Sample:
        """There is at least one value in all."""
        sizes = np.array([len(row) for row in rows])
        values = np.array([value for row in rows for value in row])
        found = np.quantile(values, quantiles)
        starts = np.repeat(np.arange(len(rows)), sizes)
        below = np.stack([np.bincount(starts, values <= one, len(rows)) for one in found], axis=1).astype(np.float64)
        slopes = np.array([slope(values, quantile, int((sizes > 0).sum())) for quantile in quantiles])
        most = np.array([max(row) for row in rows if len(row)])
        tails = (most[:, None] >= found).sum(axis=0)
        sums: Floats = np.bincount(starts, values, len(rows)).astype(np.float64)
        return cls(np.array([values.mean(), *found]), slopes, sums, sizes.astype(np.float64), below, tails)

    def logs(self, weights: Floats) -> Floats:
        """`weights` [resamples, rows] → [resamples, 1 + quantiles]; not a number of a resample without a value."""
        with np.errstate(invalid="ignore", divide="ignore"):
            total = (weights @ self.sizes)[:, None]
            means = np.log((weights @ self.sums)[:, None] / total)
            shares = (weights @ self.below) / total
            whole = self.below.sum(axis=0) / self.sizes.sum()
            return np.concatenate([means, np.log(self.figures[1:]) + self.slopes * (whole - shares)], axis=1)


def draw(groups: Groups, resamples: int, random: np.random.Generator) -> Floats:
    """[resamples, rows]: groups drawn with replacement, as many as there are; a row weighs what its group does."""
    number = int(groups.max()) + 1
    drawn = random.multinomial(number, np.full(number, 1 / number), resamples)
    return drawn[:, groups].astype(np.float64)


def slope(values: Floats, quantile: float, size: int) -> float:
    """d log Q / dp at the quantile, of `size` values that are independent; infinite where values are 0."""
    reach = min(bandwidth(quantile, size), quantile, 1 - quantile)
    low, high = np.quantile(values, (quantile - reach, quantile + reach))
    return float(np.log(high / low) / (2 * reach)) if low > 0 else np.inf


def bandwidth(quantile: float, size: int, confidence: float = 0.95) -> float:
    """Hall and Sheather 1988, with the normal distribution's shape: in shares of the values."""
    normal = NormalDist()
    at = normal.inv_cdf(quantile)
    shape = 1.5 * normal.pdf(at) ** 2 / (2 * at**2 + 1)
    return float(size ** (-1 / 3) * normal.inv_cdf((1 + confidence) / 2) ** (2 / 3) * shape ** (1 / 3))
