"""What a linear function can read off a tensor that passes inside a model.

Source: Alain and Bengio 2017, "Understanding intermediate layers using linear classifier probes"; Hewitt and Liang
2019, section 2 (a control: the same labels dealt out at random).
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megapar.config.errors import UserError

INSTALL = "pip install 'megapar[experiments]'"


@dataclass(frozen=True)
class Probe:
    """Shares of rows that are classified rightly.

    held_out: of rows that the probe has not learned from; learned: of the others; majority: of held-out rows, by always
        saying the most frequent class; control: held-out rows of a probe whose labels are dealt out at random
    """

    held_out: float
    learned: float
    majority: float
    control: float


def linear_probe(x: Tensor, labels: Tensor, *, held_out: float = 0.25, penalty: float = 1.0, seed: int = 0) -> Probe:
    """Logistic regression of labels int64 [n] on x [n, C], in fp64, by scikit-learn.

    Flatten what `capture` gives to [samples * S, C]. held_out: share of the rows, the last of an order that is a
    function of `seed`; penalty: the inverse of scikit-learn's C. No rank need be asked: x is the same on all. Raises
    UserError where scikit-learn is missing, and for shapes and labels that nothing can be learned from.
    """
    if not isinstance(x, Tensor) or not isinstance(labels, Tensor):
        raise UserError("linear_probe: give x and labels as tensors, [n, C] and [n]")
    if x.dim() != 2 or labels.shape != x.shape[:1]:
        shapes = f"x {list(x.shape)}, labels {list(labels.shape)}"
        raise UserError(f"linear_probe: {shapes}; give [n, C] and [n]")
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise UserError(f"linear_probe: needs scikit-learn, which is not installed; {INSTALL}") from None
    if labels.is_floating_point() or labels.is_complex() or not x.shape[1]:
        raise UserError(
            f"linear_probe: labels of {labels.dtype}, {x.shape[1]} columns; give int64 labels, 1 column or more"
        )
    if not 0 < held_out < 1 or not 0 < penalty < math.inf or seed < 0:
        given = f"held_out={held_out}, penalty={penalty}, seed={seed}"
        raise UserError(f"linear_probe: {given}; give a share of rows, a number above 0, and one of at least 0")
    rows, said = x.detach().double().cpu().numpy(), labels.cpu().numpy()
    if not np.isfinite(rows).all():
        raise UserError(f"linear_probe: x has {int((~np.isfinite(rows)).sum())} values that are not finite")
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(rows))
    kept = round(len(rows) * (1 - held_out))
    learned, rest = order[:kept], order[kept:]
    if not len(rest) or len(np.unique(said[learned])) < 2:
        raise UserError("linear_probe: needs rows to hold out, and two classes among the others; give more rows")

    def fitted(targets: np.ndarray) -> np.ndarray:
        made = make_pipeline(StandardScaler(), LogisticRegression(C=1.0 / penalty, max_iter=1000))
        found: np.ndarray = made.fit(rows[learned], targets[learned]).predict(rows) == targets
        return found

    dealt = draw.permutation(said)
    if len(np.unique(dealt[learned])) < 2:
        raise UserError("linear_probe: one class is too rare for a control; give more rows")
    right, shuffled = fitted(said), fitted(dealt)
    classes, counts = np.unique(said[learned], return_counts=True)
    majority = float(np.mean(said[rest] == classes[counts.argmax()]))
    return Probe(float(right[rest].mean()), float(right[learned].mean()), majority, float(shuffled[rest].mean()))
