"""The Gaussian mixture that the published implementations' figures were made with, and its data by their recipe."""

import numpy as np

from score_sde import mixture
from tests import reference


class Mixture(mixture.Mixture):
    @classmethod
    def reference(cls):
        """The mixture of the reference figures, channels last, float64."""
        shape = (3, 8, 8)
        means = [0.5 * reference.normal(f"gmm/mu/{k}", shape) for k in range(3)]
        logvars = [0.5 * reference.normal(f"gmm/logvar/{k}", shape).astype(np.float64) for k in range(3)]
        variances = [c * np.exp(v) for c, v in zip((0.04, 0.09, 0.0625), logvars, strict=True)]
        return cls(
            np.array([0.5, 0.3, 0.2]),
            np.stack([reference.nhwc(m) for m in means]).astype(np.float64),
            np.stack([reference.nhwc(v) for v in variances]),
        )

    def sample(self, name: str, n: int) -> np.ndarray:
        """n images (n, H, W, C) float32, by the reference recipe."""
        k = reference.rng(name + "/k").choice(len(self.weights), size=n, p=self.weights)
        chw = np.moveaxis(self.means, -1, 1).shape[1:]
        z = reference.nhwc(reference.normal(name + "/z", (n, *chw)))
        return (self.means[k] + np.sqrt(self.variances[k]) * z).astype(np.float32)
