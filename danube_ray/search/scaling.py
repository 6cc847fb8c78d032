"""Scaling laws from proxy runs: loss as a power of compute, parameters or tokens, plus what can't be reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit

from danube_ray.config import require


@dataclass(frozen=True)
class PowerLaw:
    """loss(x) = irreducible + (scale / x) ** exponent (Kaplan et al., 2020; Hoffmann et al., 2022)."""

    irreducible: float
    scale: float
    exponent: float

    def __call__(self, x: float) -> float:
        return self.irreducible + (self.scale / x) ** self.exponent


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """Least squares in loss over (x, loss) points; at least four, since three parameters fit three points exactly."""
    require(len(points) >= 4, "points", len(points), "4 or more", "run more proxies")
    x, loss = np.array(points, dtype=np.float64).T
    reference = np.exp(np.log(x).mean())  # fitting x / reference keeps the scale near 1

    def law(x: np.ndarray, irreducible: float, log_scale: float, exponent: float) -> np.ndarray:
        return irreducible + np.exp(exponent * (log_scale - np.log(x / reference)))

    start = (0.9 * loss.min(), 0.0, 0.3)
    bounds = ((0.0, -50.0, 1e-3), (loss.min(), 50.0, 3.0))
    (irreducible, log_scale, exponent), _ = curve_fit(law, x, loss, p0=start, bounds=bounds, max_nfev=20_000)
    return PowerLaw(float(irreducible), float(np.exp(log_scale) * reference), float(exponent))
