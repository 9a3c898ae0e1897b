"""Other values at named sites: what a model makes of them says what they are for.

Source: Meng et al. 2022, "Locating and editing factual associations in GPT", section 2 (activations restored from
another run); Wang et al. 2023, "Interpretability in the wild", section 3 (heads replaced by their mean).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megapar.config.errors import ConfigError
from megapar.config.sites import FEATURES, HEADS, WEIGHTS, Site
from megapar.interpret.local import Local, View
from megapar.interpret.walk import Walk

Change = Callable[[Tensor, Local], Tensor]


class Patch(Walk):
    """`with megapar.patch(model, {"layers.1.attention.heads": 0.0}, blocks=[3]):` runs a model with other values there.

    values: by site a number, a tensor as `Capture` gives it, [samples, S, ...], whose row is a sample's number (1 where
        it is the same for all samples, or all places), or a function (x [t, blocks, inner], Local) -> x of a rank's own
    blocks: heads (or features) that are changed, by number on all ranks; default: all
    places: of the tokens that are changed, in their samples; default: all

    The gradient goes through what is not changed. Raises ConfigError for a place or a shape that there isn't.
    """

    def __init__(
        self,
        model: Any,
        values: Mapping[str, float | Tensor | Change],
        *,
        blocks: Sequence[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, list(values), "patch")
        self.values, self.blocks, self.places = dict(values), blocks, places
        for site in self.sites:
            if site.kind == WEIGHTS:
                raise ConfigError("patch", site.name, "is not on the way of a pass; patch the heads: attention.heads")
            if blocks is not None and site.kind not in (*HEADS, *FEATURES):
                raise ConfigError("patch", site.name, "has no heads or features to choose; leave out blocks")

    def passes(self, site: Site, view: View, tensor: Tensor) -> Tensor | None:
        x, local, value = view.take(tensor), view.local, self.values[site.name]
        if callable(value):
            new = value(x, local)
        elif isinstance(value, Tensor):
            new = _rows(site, value, x, local)
        else:
            new = torch.full_like(x, value)
        chosen = self._chosen(x, local)
        return view.put(tensor, new if chosen is None else torch.where(chosen, new, x))

    def _chosen(self, x: Tensor, local: Local) -> Tensor | None:
        """bool [t or 1, blocks or 1, 1]; None: all."""
        if self.blocks is None and self.places is None:
            return None
        chosen = torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)
        if self.blocks is not None:
            own = torch.arange(local.first, local.first + x.shape[1], device=x.device)
            chosen = chosen & torch.isin(own, torch.tensor(self.blocks, device=x.device))[None, :, None]
        if self.places is not None:
            chosen = chosen & torch.isin(local.places, torch.tensor(self.places, device=x.device))[:, None, None]
        return chosen


def _rows(site: Site, value: Tensor, x: Tensor, local: Local) -> Tensor:
    """What a rank has of a tensor of all samples."""
    whole = value.unsqueeze(3 if site.kind in FEATURES else 2) if site.kind not in HEADS else value
    if whole.dim() != 4 or whole.shape[2] != local.blocks or whole.shape[3] != x.shape[2]:
        least = [local.blocks, x.shape[2]]
        problem = f"has values {list(value.shape)}; give [samples, S, ...] as `capture` does, here of {least} a token"
        raise ConfigError("patch", site.name, problem)
    most = (int(local.samples.max()), int(local.places.max())) if len(x) else (0, 0)
    for name, dim, last in (("samples", 0, most[0]), ("places", 1, most[1])):
        if whole.shape[dim] != 1 and whole.shape[dim] <= last:
            problem = f"has values of {whole.shape[dim]} {name}, and number {last} passes; give all, or 1"
            raise ConfigError("patch", site.name, problem)
    samples = local.samples if whole.shape[0] > 1 else torch.zeros_like(local.samples)
    places = local.places if whole.shape[1] > 1 else torch.zeros_like(local.places)
    return whole[samples, places, local.first : local.first + x.shape[1]].to(x.device, x.dtype)
