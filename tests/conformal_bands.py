"""The exact distribution of the coverage of split conformal prediction over repetitions."""

import numpy as np
from scipy.stats import betabinom

ALPHAS = (0.01, 0.05, 0.1, 0.2)


def coverage_band(repetitions: int, rows: int, new: int, k: int, level: float = 0.999) -> tuple[float, float]:
    """Band of the mean coverage of `new` rows over repetitions, each calibrated on its own `rows`: exact convolution.

    With continuous scores and the k-th smallest of `rows` as threshold, the covered among `new` rows are beta-binomial
    (new, k, rows + 1 - k). A method whose scores are so distributed falls outside with probability 1 - level.
    """
    if k > rows:
        return 1.0, 1.0
    total = repetitions * new
    one = betabinom.pmf(np.arange(new + 1), new, k, rows + 1 - k)
    pmf = np.fft.irfft(np.fft.rfft(one, 2 * total) ** repetitions, 2 * total)[: total + 1]
    cdf = np.cumsum(pmf)
    low = int(np.searchsorted(cdf, (1 - level) / 2))
    high = int(np.searchsorted(cdf, 1 - (1 - level) / 2))
    return low / total, high / total
