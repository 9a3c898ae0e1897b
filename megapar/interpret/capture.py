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
    """x [t, blocks, inner] of a pass on this rank. key: equal for pieces of the same tokens and blocks; a piece keeps
    its own when a part of it is given up"""

    x: Tensor
    local: Local
    key: str


class Capture(Walk):
    """`with megapar.capture(model, ["layers.2.attention.out"]) as seen:` keeps what passes these sites.

    `seen[site]` is then the tensor of all samples, [samples, S, ...], the same on every rank and in every layout, also
    after the `with`; samples by their numbers, shorter ones with zeros behind. Collective. A sample that passes again,
    as in the next step, takes the place of its earlier values; `seen.clear()` forgets all.

    Sites are in docs/interpretability.md. With gradients=True `seen[site + ".gradient"]` is that of the loss. While a
    text is written a sample's number is its place in the cache, and S its tokens; with written=False these passes are
    left out.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[str],
        *,
        gradients: bool = False,
        written: bool = True,
        key: str = "sites",
    ) -> None:
        super().__init__(model, sites, key, written=written)
        self.gradients = gradients
        self._kinds = {site.name: site.kind for site in self.sites}
        self._pieces: dict[str, list[Piece]] = {}
        self._ends: dict[str, dict[int, int]] = {}  # by sample: the last place that has passed

    def __enter__(self) -> "Capture":
        super().__enter__()
        return self

    def clear(self) -> None:
        self._pieces.clear()
        self._ends.clear()

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
        self._forget(name, local)
        # A copy: what follows may write over it, and a stage's output is given up when it is sent.
        self._pieces.setdefault(name, []).append(Piece(x.detach().clone(), local, _key(local)))

    def _forget(self, name: str, local: Local) -> None:
        """Give up what has passed of the same samples from the places on that pass now: of an earlier text."""
        numbers, rows = local.samples.unique(return_inverse=True)
        begins = torch.full_like(numbers, 1 << 62).scatter_reduce(0, rows, local.places, "amin")
        stops = torch.zeros_like(numbers).scatter_reduce(0, rows, local.places, "amax")
        ends = self._ends.setdefault(name, {})
        passing = list(zip(numbers.tolist(), begins.tolist(), stops.tolist(), strict=True))
        again = [(number, begin) for number, begin, _ in passing if ends.get(number, -1) >= begin]
        ends |= {number: stop for number, _, stop in passing}
        if not again:
            return
        kept = []
        for piece in self._pieces.get(name, []):
            stays = torch.ones_like(piece.local.places, dtype=torch.bool)
            for number, begin in again:
                stays &= (piece.local.samples != number) | (piece.local.places < begin)
            if bool(stays.all()):
                kept.append(piece)
            elif bool(stays.any()):
                there = replace(piece.local, samples=piece.local.samples[stays], places=piece.local.places[stays])
                kept.append(replace(piece, x=piece.x[stays], local=there))
        self._pieces[name] = kept

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
        elsewhere = {one["key"] for one in before}
        rows, ranks = torch.tensor(numbers, device=mesh.device), torch.zeros_like(found[..., 0])
        for piece, one in zip(pieces, own, strict=True):
            if one["key"] not in elsewhere:  # where a lower rank has the same, that one says it
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
        "key": piece.key,
        "last": int(local.places.max()) if len(local.samples) else 0,
        "blocks": local.blocks,
        "inner": piece.x.shape[2],
        "dtype": str(piece.x.dtype),
    }


def _key(local: Local) -> str:
    begin = [int(local.samples[0]), int(local.places[0])] if len(local.samples) else []
    return f"{torch.unique(local.samples).tolist()} {begin} {len(local.samples)} {local.first}"
