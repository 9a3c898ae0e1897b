"""Other values at named sites: what a model makes of them says what they are for.

Source: Meng et al. 2022, "Locating and editing factual associations in GPT", section 2 (activations restored from
another run); Wang et al. 2023, "Interpretability in the wild", section 3 (heads replaced by their mean).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from megapar.config.errors import ConfigError
from megapar.config.sites import FEATURES, HEADS, WEIGHTS, Site, blocks_of
from megapar.interpret.local import Local, View
from megapar.interpret.walk import Walk
from megapar.parallel.agreement import gather_texts

Change = Callable[[Tensor, Local], Tensor]


class Patch(Walk):
    """`with megapar.patch(model, {"layers.1.attention.heads": 0.0}, blocks=[3]):` runs a model with other values there.

    values: by site a number, a tensor as `Capture` gives it, [samples, S, ...], whose row is a sample's number (1 where
        it is the same for all samples, or all places), or a function (x [t, blocks, inner], Local) -> x of a rank's own
    blocks: heads (or features) that are changed, by number on all ranks; default: all
    places: of the tokens that are changed, in their samples; default: all

    The gradient goes through what is not changed. Raises ConfigError for a place, a head or a kind of value that there
    isn't. What only a pass shows, a shape that does not fit or places that nothing stands at, may concern one rank: it
    changes nothing there, and the end of the `with` raises ConfigError for it on all ranks.
    """

    def __init__(
        self,
        model: Any,
        values: Mapping[str, float | Tensor | Change],
        *,
        blocks: Sequence[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError("patch", values, "give values by site, such as {layers.1.attention.heads: 0.0}")
        super().__init__(model, list(values), "patch")
        self.values = {name: _value(name, value) for name, value in values.items()}
        self.blocks, self.places = _numbers("blocks", blocks), _numbers("places", places)
        self._forget()
        for site in self.sites:
            if site.kind == WEIGHTS:
                raise ConfigError("patch", site.name, "is not on the way of a pass; patch the heads: attention.heads")
            if blocks is not None and site.kind not in (*HEADS, *FEATURES):
                raise ConfigError("patch", site.name, "has no heads or features to choose; leave out blocks")
            count = blocks_of(site, self.part.config.model)
            if self.blocks is not None and max(self.blocks) >= count:
                raise ConfigError("patch", site.name, f"has blocks 0 to {count - 1}, and no {max(self.blocks)}")

    def _forget(self) -> None:
        self._problem: list[str] = []  # a site, and what is wrong there
        self._passed = self._changed = False

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error and error[0] is not None:
            return  # of what this rank has run into; it may be the only one
        said = {"problem": self._problem, "passed": self._passed, "changed": self._changed}
        mesh = self.part.mesh
        found = [json.loads(text) for text in gather_texts(json.dumps(said), mesh["world"], mesh.device)]
        self._forget()
        for one in found:
            if one["problem"]:
                raise ConfigError("patch", *one["problem"])
        if any(one["passed"] for one in found) and not any(one["changed"] for one in found):
            raise ConfigError("patch", self.places, "no token stood at any of these places; count from 0")

    def passes(self, site: Site, view: View, tensor: Tensor) -> Tensor | None:
        x, local, value = view.take(tensor), view.local, self.values[site.name]
        if callable(value):
            new, problem = _given(value(x, local), x)
        elif isinstance(value, Tensor):
            new, problem = _rows(site, value, x, local)
        else:
            new, problem = torch.full_like(x, value), ""
        self._passed |= bool((local.places >= 0).any())
        if problem:
            self._problem = self._problem or [site.name, problem]
            self._changed = True
            return None
        if self.places is None:
            self._changed = True
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
            here = torch.isin(local.places, torch.tensor(self.places, device=x.device))
            self._changed |= bool(here.any())
            chosen = chosen & here[:, None, None]
        return chosen


def _value(name: str, value: Any) -> float | Tensor | Change:
    """Raises ConfigError for what is none of the three."""
    if isinstance(value, Tensor):
        return value if value.dim() else float(value)
    if isinstance(value, int | float):
        return float(value)
    if callable(value):
        return value
    problem = f"a {type(value).__name__} is no value; give a number, a torch tensor as `capture` does, or a function"
    raise ConfigError("patch", name, problem)


def _numbers(what: str, numbers: Sequence[int] | None) -> list[int] | None:
    """Raises ConfigError for what is no list of numbers from 0 on."""
    if numbers is None:
        return None
    found = list(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else []
    if not found or any(not isinstance(one, Integral) or isinstance(one, bool) or one < 0 for one in found):
        raise ConfigError("patch", numbers, f"give {what} as a list of numbers from 0 on, or leave them out")
    return [int(one) for one in found]


def _given(new: Any, x: Tensor) -> tuple[Tensor, str]:
    """(What a function has made of x; a problem)."""
    if not isinstance(new, Tensor) or new.shape != x.shape:
        got = f"values {list(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        return x, f"its function gives {got}; give a tensor of the shape of x, here {list(x.shape)}"
    return new.to(x.device, x.dtype), ""


def _rows(site: Site, value: Tensor, x: Tensor, local: Local) -> tuple[Tensor, str]:
    """(What a rank has of a tensor of all samples; a problem)."""
    whole = value.unsqueeze(3 if site.kind in FEATURES else 2) if site.kind not in HEADS else value
    if whole.dim() != 4 or whole.shape[2] != local.blocks or whole.shape[3] != x.shape[2]:
        least = [local.blocks, x.shape[2]]
        return x, f"has values {list(value.shape)}; give [samples, S, ...] as `capture` does, here of {least} a token"
    most = (int(local.samples.max()), int(local.places.max())) if len(x) else (0, 0)
    for name, dim, last in (("samples", 0, most[0]), ("places", 1, most[1])):
        if whole.shape[dim] != 1 and whole.shape[dim] <= last:
            return x, f"has values of {whole.shape[dim]} {name}, and number {last} passes; give all, or 1"
    samples = local.samples if whole.shape[0] > 1 else torch.zeros_like(local.samples)
    places = local.places if whole.shape[1] > 1 else torch.zeros_like(local.places)
    return whole[samples, places, local.first : local.first + x.shape[1]].to(x.device, x.dtype), ""
