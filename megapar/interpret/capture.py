"""Tensors of named sites, kept while a model runs, and brought together from all ranks when they are asked for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.sites import FEATURES, HEADS, Site
from megapar.interpret.local import Local, View
from megapar.interpret.walk import Walk, in_backward
from megapar.parallel.agreement import gather_texts
from megapar.parallel.collectives import all_reduce

GRADIENT = ".gradient"  # behind a site's name


@dataclass(frozen=True)
class Piece:
    """x [t, blocks, inner] of a pass on this rank."""

    x: Tensor
    local: Local


class Capture(Walk):
    """`with megapar.capture(model, ["layers.2.attention.out"]) as seen:` keeps what passes these sites.

    `seen[site]` is then the tensor of all samples, [samples, S, ...], the same on every rank and in every layout, also
    after the `with`; samples by their numbers, shorter ones with zeros behind. Collective. A sample that passes again,
    as in the next step, takes the place of its earlier values; `seen.clear()` forgets all.

    Sites are in docs/interpretability.md. With gradients=True `seen[site + ".gradient"]` is that of the loss. While a
    text is written a sample's number is its place in the cache, and S its tokens.
    """

    def __init__(self, model: Any, sites: Sequence[str], *, gradients: bool = False, key: str = "sites") -> None:
        super().__init__(model, sites, key)
        self.gradients = gradients
        self._kinds = {site.name: site.kind for site in self.sites}
        self._pieces: dict[str, list[Piece]] = {}

    def __enter__(self) -> "Capture":
        super().__enter__()
        return self

    def clear(self) -> None:
        self._pieces.clear()

    def passes(self, site: Site, view: View, tensor: Tensor) -> None:
        if in_backward():  # the same again
            return
        self._keep(site.name, view.take(tensor), view.local)
        if self.gradients and tensor.requires_grad:
            tensor.register_hook(lambda grad: self._keep(site.name + GRADIENT, view.take(grad), view.local))

    def attends(self, site: Site, weights: Tensor, local: Local) -> None:
        if not in_backward():
            self._keep(site.name, weights, local)

    def _keep(self, name: str, x: Tensor, local: Local) -> None:
        there = local.places >= 0
        if not bool(there.all()):  # padding
            x, local = x[there], replace(local, samples=local.samples[there], places=local.places[there])
        # A copy: what follows may write over it, and a stage's output is given up when it is sent.
        self._pieces.setdefault(name, []).append(Piece(x.detach().clone(), local))

    def __getitem__(self, name: str) -> Tensor:
        return self.numbered(name)[1]

    def numbered(self, name: str) -> tuple[list[int], Tensor]:
        """(numbers of the samples, their tensor). Raises KeyError, on all ranks, for what was not seen."""
        mesh, pieces = self.part.mesh, self._pieces.get(name, [])
        own = [_facts(piece) for piece in pieces]
        texts = gather_texts(json.dumps(own), mesh["world"], mesh.device)
        told = [one for text in texts for one in json.loads(text)]
        if not told:
            known = ", ".join(site.name for site in self.sites)
            raise KeyError(f"{name}: nothing has passed; captured are {known}")
        numbers = sorted({number for one in told for number in one["samples"]})
        blocks, inner = told[0]["blocks"], max(one["inner"] for one in told)
        length = 1 + max(one["last"] for one in told)
        dtype = {str(one): one for one in (torch.float64, torch.float32, torch.bfloat16)}[told[0]["dtype"]]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = torch.zeros(len(numbers), length, blocks, inner, dtype=wide, device=mesh.device)
        kind = self._kinds[name.removesuffix(GRADIENT)]
        # Ranks that share a key head have parts of its gradient.
        parts = name.endswith(GRADIENT) and kind in ("attention.k", "attention.v")
        before = [] if parts else [one for text in texts[: mesh.rank] for one in json.loads(text)]
        elsewhere = {_key(one) for one in before}
        rows, ranks = torch.tensor(numbers, device=mesh.device), torch.zeros_like(found[..., 0])
        for piece, one in zip(pieces, own, strict=True):
            if _key(one) not in elsewhere:  # where a lower rank has the same, that one says it
                place, (_, width, depth) = piece.local, piece.x.shape
                at = torch.searchsorted(rows, place.samples)
                found[at, place.places, place.first : place.first + width, :depth] = piece.x.to(wide)
                ranks[at, place.places, place.first : place.first + width] = 1.0
        if not parts and all_reduce(ranks, mesh["world"]).max() > 1.0:
            raise UserError(f"{name}: a sample has passed on several ranks; call seen.clear() between passes")
        found = all_reduce(found, mesh["world"]).to(dtype)  # every element is of one rank, and 0 of the others
        if kind in HEADS:
            return numbers, found
        return numbers, found.squeeze(3 if kind in FEATURES else 2)


def _facts(piece: Piece) -> dict[str, Any]:
    local = piece.local
    return {
        "samples": torch.unique(local.samples).tolist(),
        "begin": [int(local.samples[0]), int(local.places[0])] if len(local.samples) else [],
        "tokens": len(local.samples),
        "last": int(local.places.max()) if len(local.samples) else 0,
        "first": local.first,
        "blocks": local.blocks,
        "inner": piece.x.shape[2],
        "dtype": str(piece.x.dtype),
    }


def _key(one: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for pieces of the same tokens and blocks."""
    return tuple(one["samples"]), tuple(one["begin"]), one["tokens"], one["first"]
