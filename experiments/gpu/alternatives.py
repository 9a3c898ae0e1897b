"""The rows of the kernels' tables of block sizes that a Hopper card takes, and what else each of them could be.

Not those of attention with a bias, which is launched without one here."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megapar.kernels import matmul
from megapar.kernels._common import Launch, matrix
from megapar.kernels.attention import launch as attention

ARCHS = ("sm_90", "fp32")
MOST = 6  # alternatives of a row
SHARED = 227 << 10  # bytes of a program, on sm_90
MATMUL_SIZES = {  # (bytes of an element, place in the table's row): M, N, K whose product takes that place
    (2, 0): (8192, 8192, 4096), (2, 1): (2048, 2048, 4096), (2, 2): (1024, 1024, 4096), (4, 0): (4096, 4096, 4096),
}  # fmt: skip


@dataclass(frozen=True)
class TableRow:
    """A row of a table. key: of the table; place: in the row's tuple, None where it is one Config.

    size: bytes of an element of the tensors
    """

    table: ModuleType
    key: tuple[Any, ...]
    place: int | None
    config: Any
    size: int

    @property
    def name(self) -> str:
        kernel = "matmul" if self.place is not None else "attention"
        return " ".join([kernel, *map(str, self.key), *([] if self.place is None else [str(self.place)])])

    def patched(self, config: Any, interpreted: bool) -> AbstractContextManager[Any]:
        """With this Config in the row's place; interpreted: in that of the interpreter."""
        key = self.key
        if interpreted:
            key = ("interpret", self.size) if self.place is not None else (self.key[0], "interpret", 256)
        return mock.patch.dict(self.table.CONFIGS, {key: config if self.place is None else (config,)})


def rows() -> list[TableRow]:
    found = []
    for key, config in attention.CONFIGS.items():
        if key[1] in ARCHS and "bias" not in key[0]:
            found.append(TableRow(attention, key, None, config, 4 if key[1] == "fp32" else 2))
    for arch, size in matmul.CONFIGS:
        if arch in ARCHS:
            choices = enumerate(matmul.CONFIGS[arch, size])
            found += [TableRow(matmul, (arch, size), place, config, size) for place, config in choices]
    return found


def alternatives(row: TableRow) -> list[Any]:
    """3 to 6 Configs that differ from the row's in one or two things, those first that ask less of the card."""
    found: list[Any] = []
    for changes in moves(row):
        config = replace(row.config, **changes, source="")
        if is_possible(row, config) and config != row.config and config not in found:
            found.append(config)
    return found[:MOST]


def moves(row: TableRow) -> Iterator[dict[str, Any]]:
    now = row.config
    if row.place is None:
        yield {"warps": 12 - now.warps}
        yield {"stages": now.stages + 1}
        yield {"stages": now.stages - 1}
        yield {"edge": now.edge // 2}
        yield {"step": now.step // 2, "edge": min(now.edge, now.step // 2)}
        yield {"rows": now.rows // 2, "warps": 4}
        yield {"rows": now.rows // 2}
        yield {"edge": 2 * now.edge}
        yield {"step": 0 if now.step else now.edge}
        yield {"step": 2 * now.step}
        yield {"rows": 2 * now.rows}
    else:
        yield {"stages": now.stages - 1}
        yield {"warps": 12 - now.warps}
        yield {"stages": now.stages + 1}
        yield {"columns": now.columns // 2}
        yield {"step": now.step // 2}
        yield {"rows": now.rows // 2}
        yield {"columns": now.columns // 2, "stages": now.stages + 1}


def is_possible(row: TableRow, config: Any) -> bool:
    """Sizes that the kernels take, that fit into shared memory, and that four warps have registers for."""
    if row.place is not None:
        small = config.rows * config.columns <= 128 * 128
        wide_enough = config.step >= 32 and config.rows >= 64 and config.columns >= 64 and config.stages >= 2
        return wide_enough and (small or config.warps == 8)
    kernel, _, width = row.key
    forward = kernel == "forward"
    owned, streamed = config.rows * (1 if forward else 2), 2 * (config.step * config.stages + forward * config.edge)
    fits = row.size * width * (owned + streamed) <= SHARED
    registers = config.warps == 8 or row.size == 4 or config.rows <= 64
    masked = config.step == 0 and forward and not config.tma  # a TMA tile of no rows is none
    sizes = 16 <= config.rows <= 128 and config.edge >= 16 and config.step <= 128 and config.stages >= 1
    return fits and registers and sizes and (masked or config.step >= config.edge)


def launch_of(row: TableRow, arch: str, device: str, small: bool) -> tuple[Launch, list[Tensor], float]:
    """A launch that takes this row, the tensors that it writes, and its 1e9 FLOPs."""
    dtype = torch.bfloat16 if row.size == 2 else torch.float32
    randn = partial(torch.randn, dtype=dtype, device=device)
    if row.place is not None:
        M, N, K = (200, 264, 136) if small else MATMUL_SIZES[row.size, row.place]
        a, b = randn(M, K), randn(N, K)
        out = torch.full((M, N), torch.nan, dtype=dtype, device=device)
        return matmul.launch(arch, a, b.t(), out), [out], 2e-9 * M * N * K
    kernel, _, width = row.key
    B, S, N, K, D = (1, 150, 1, 1, 16) if small else (1, 8192 if row.size == 2 else 2048, 16, 8, width)
    q, do = randn(B, S, N, D), matrix(randn(B, S, N, D))
    k, v = (randn(B, S, K, D) for _ in range(2))
    call = attention.Call.of(q, k, v, None, None, D**-0.5, attention.UNLIMITED, 0, None)
    o, lse = attention.outputs(q, v)
    work = 2e-9 * B * N * S * S * D
    if kernel == "forward":
        return call.forward(arch, matrix(o), lse), [o, lse], work
    statistics = lse.new_empty(2, *lse.shape)
    if not q.is_meta:
        call.forward(arch, matrix(o), lse).run()
        call.statistics(arch, matrix(o), do, lse, torch.zeros_like(lse), statistics).run()
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    if kernel == "dq":
        return call.dq(arch, do, statistics, matrix(dq)), [dq], 1.5 * work
    return call.dkdv(arch, do, statistics, matrix(dk), matrix(dv)), [dk, dv], 2 * work
