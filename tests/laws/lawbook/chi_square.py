"""χ² for samples that are each drawn from a distribution of their own, known before the draw.

What is drawn at a position of a text depends on the text before it (penalties count its tokens), so counts are no
multinomial. But the differences e_x − p between a token drawn, as a unit vector, and its distribution given all that
came before are a martingale: over any group of draws that the past decides, their sum z has the covariance
C = Σ (diag p − p pᵀ), and zᵀ C⁻¹ z is χ² (martingale central limit theorem). With one p for a group it is Pearson's.
"""

from __future__ import annotations

import torch
from scipy.stats import chi2
from torch import Tensor

MIN_VARIANCE = 5.0  # of a direction that counts: as with Pearson's five a cell, less is no normal variable


def p_value(drawn: Tensor, probs: Tensor, group: Tensor) -> float:
    """drawn [N] int64; probs [N, V] float64, each row of mass 1; group [N] int64. 0 if what was drawn is impossible."""
    if (probs.gather(1, drawn[:, None]) == 0).any():
        return 0.0
    statistic, freedom = 0.0, 0
    order = group.argsort(stable=True)
    for members in order.split(group.bincount().tolist()):
        own, freedom_here = _statistic(drawn[members], probs[members])
        statistic, freedom = statistic + own, freedom + freedom_here
    assert freedom > 0, "too few samples to say anything"
    return float(chi2.sf(statistic, freedom))


def _statistic(drawn: Tensor, probs: Tensor) -> tuple[float, int]:
    """Of one group, zᵀ C⁻¹ z and its degrees of freedom, where C has variance enough."""
    expected = probs.sum(0)  # [V]
    difference = drawn.bincount(minlength=len(expected)) - expected
    variance, direction = torch.linalg.eigh(expected.diag() - probs.T @ probs)
    keep = variance >= MIN_VARIANCE
    along = direction.T[keep] @ difference
    return float((along**2 / variance[keep]).sum()), int(keep.sum())
