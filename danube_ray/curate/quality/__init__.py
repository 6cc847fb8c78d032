"""Models of how good a text is: a gradient-boosted one over rules' signals, and an encoder where that one is unsure.

What good means is what the labelled folders say: `quality` is the probability that a text is of the good ones, where
good and raw text are equally frequent.
"""

from danube_ray.curate.quality.encoder import Encoder
from danube_ray.curate.quality.model import QualityModel
from danube_ray.curate.quality.settings import QualitySettings

__all__ = ["Encoder", "QualityModel", "QualitySettings"]
