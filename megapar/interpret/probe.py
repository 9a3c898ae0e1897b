"""What a linear function can read off a tensor that passes inside a model.

Source: Alain and Bengio 2017, "Understanding intermediate layers using linear classifier probes"; Hewitt and Liang
2019, section 2 (a control: the same labels dealt out at random).
"""

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
    if x.dim() != 2 or labels.shape != x.shape[:1]:
        shapes = f"x {list(x.shape)}, labels {list(labels.shape)}"
        raise UserError(f"linear_probe: {shapes}; give [n, C] and [n]")
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise UserError(f"linear_probe: needs scikit-learn, which is not installed; {INSTALL}") from None
    rows, said = x.detach().double().cpu().numpy(), labels.cpu().numpy()
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

    right, shuffled = fitted(said), fitted(draw.permutation(said))
    classes, counts = np.unique(said[learned], return_counts=True)
    majority = float(np.mean(said[rest] == classes[counts.argmax()]))
    return Probe(float(right[rest].mean()), float(right[learned].mean()), majority, float(shuffled[rest].mean()))
