"""BatchNorm with fixed statistics, as a scale and a bias per channel.

fold    weight (x - mean) / sqrt(var + eps) + bias -> scale x + bias, when weights are read
unfold  back, with mean 0 and var 1 - eps, for a strict load_state_dict in timm

Both compute in float64 and round once, so that unfold and fold give back the same numbers.
"""

from collections.abc import Iterable

import numpy as np

from vit_at.errors import UserError

EPSILON = 1e-5  # of PyTorch's BatchNorm
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"  # stored by PyTorch, and without use in evaluation

StateDict = dict[str, np.ndarray]


def fold(state_dict: StateDict, layers: Iterable[str]) -> StateDict:
    """The arrays with each layer's statistics folded into its weight and bias.

    Raises:
      UserError: a variance is negative.
    """
    folded = dict(state_dict)
    for layer in layers:
        mean, var = (folded.pop(f"{layer}.{name}").astype(np.float64) for name in STATISTICS)
        if var.min() < 0:
            raise UserError(
                f"{layer}.running_var holds {var.min():g}, but a variance is 0 or more; the file "
                "is damaged, so fetch or export it again"
            )
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        scale = folded[weight] / np.sqrt(var + EPSILON)
        folded[bias] = (folded[bias] - mean * scale).astype(folded[bias].dtype)
        folded[weight] = scale.astype(folded[weight].dtype)
    return folded


def unfold(state_dict: StateDict, layers: Iterable[str]) -> StateDict:
    """The arrays with statistics of each layer that change nothing."""
    statistics: StateDict = {}
    for layer in layers:
        zeros = np.zeros_like(state_dict[f"{layer}.bias"])
        statistics |= {f"{layer}.running_mean": zeros, f"{layer}.running_var": zeros + 1 - EPSILON}
        statistics[f"{layer}.{COUNTER}"] = np.zeros((), np.int64)
    return state_dict | statistics
