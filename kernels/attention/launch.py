"""Attention's launches: block sizes by architecture, each kernel's arguments, and what is compiled without a GPU."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapar.kernels._common import Launch, matrix, next_power_of_2, num_tiles, precision, relative, tiles_of
from megapar.kernels.attention.backward import (
    attention_dbias_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_statistics_kernel,
)
from megapar.kernels.attention.forward import attention_forward_kernel
from megapar.kernels.shapes import LLAMA, MODELS, Sizes

UNLIMITED = 1 << 30  # a side of a window that reaches everything; positions are fewer


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel: rows that a program owns, full and boundary tiles of its loop; warps, stages, TMA.

    step: 0, in the forward only: all tiles are masked as the boundary's. One loop needs fewer registers than two.
    source: whose clock chose it; "": nobody's, but what the compiler makes of it. experiments/gpu/tune.py writes it
    """

    rows: int
    step: int
    edge: int
    warps: int
    stages: int
    tma: bool = False
    source: str = field(default="", compare=False)


# (kernel, architecture, widest head) -> Config for 16-bit tensors, chosen by what the compiler makes of them:
# docs/kernels.md has the figures. sm_80's fit into the 99 KB of its smaller relatives.
CONFIGS = {
    ("forward", "sm_80", 64): Config(128, 64, 32, 8, 2),
    ("forward", "sm_80", 128): Config(128, 32, 32, 8, 3),
    ("forward", "sm_80", 256): Config(64, 0, 64, 8, 1),
    ("forward", "sm_90", 64): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_90", 96): Config(128, 64, 64, 8, 2, tma=True),
    ("forward", "sm_90", 128): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_90", 256): Config(128, 64, 32, 8, 2, tma=True),
    ("forward", "sm_100", 64): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_100", 96): Config(128, 128, 64, 8, 3, tma=True),
    ("forward", "sm_100", 128): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_100", 256): Config(128, 64, 32, 8, 2, tma=True),
    ("forward", "gfx942", 128): Config(128, 64, 32, 8, 2),
    ("forward", "gfx942", 256): Config(64, 32, 16, 4, 1),
    ("forward", "interpret", 256): Config(128, 128, 64, 4, 1),
    ("dkdv", "sm_80", 64): Config(128, 32, 32, 8, 2),
    ("dkdv", "sm_80", 128): Config(64, 32, 16, 4, 2),
    ("dkdv", "sm_80", 256): Config(32, 32, 16, 4, 1),
    ("dkdv", "sm_90", 64): Config(128, 64, 64, 8, 2, tma=True),
    ("dkdv", "sm_90", 96): Config(128, 32, 32, 8, 2, tma=True),
    ("dkdv", "sm_90", 128): Config(128, 64, 32, 8, 2, tma=True),
    ("dkdv", "sm_90", 256): Config(64, 32, 16, 8, 2, tma=True),
    ("dkdv", "sm_100", 128): Config(128, 64, 32, 8, 2, tma=True),
    ("dkdv", "sm_100", 256): Config(64, 32, 16, 8, 2, tma=True),
    ("dkdv", "gfx942", 128): Config(64, 32, 16, 4, 2),
    ("dkdv", "gfx942", 256): Config(32, 32, 16, 4, 1),
    ("dkdv", "interpret", 256): Config(128, 128, 64, 4, 1),
    ("dq", "sm_80", 64): Config(128, 64, 32, 8, 2),
    ("dq", "sm_80", 128): Config(128, 32, 16, 8, 2),
    ("dq", "sm_80", 256): Config(32, 32, 16, 4, 1),
    ("dq", "sm_90", 64): Config(128, 128, 64, 8, 2, tma=True),
    ("dq", "sm_90", 96): Config(128, 64, 32, 8, 2, tma=True),
    ("dq", "sm_90", 128): Config(128, 128, 64, 8, 2, tma=True),
    ("dq", "sm_90", 256): Config(64, 32, 16, 4, 2, tma=True),
    ("dq", "sm_100", 128): Config(128, 64, 64, 8, 2, tma=True),
    ("dq", "sm_100", 256): Config(64, 32, 16, 4, 2, tma=True),
    ("dq", "gfx942", 128): Config(128, 32, 16, 4, 2),
    ("dq", "gfx942", 256): Config(32, 32, 16, 4, 1),
    ("dq", "interpret", 256): Config(128, 128, 64, 4, 1),
    # With a bias, where the rows above would spill: its tile and where it lies take registers, too.
    ("forward_bias", "sm_80", 64): Config(64, 64, 32, 4, 2),
    ("forward_bias", "sm_80", 128): Config(128, 32, 16, 8, 2),
    ("forward_bias", "sm_90", 64): Config(64, 64, 32, 4, 2, tma=True),
    ("forward_bias", "sm_90", 96): Config(128, 32, 32, 8, 2, tma=True),
    ("forward_bias", "sm_90", 128): Config(128, 64, 32, 8, 2, tma=True),
    ("forward_bias", "sm_100", 64): Config(128, 64, 32, 8, 2, tma=True),
    ("forward_bias", "sm_100", 96): Config(128, 32, 32, 8, 2, tma=True),
    ("dkdv_bias", "sm_80", 64): Config(128, 32, 32, 8, 1),
    ("dkdv_bias", "sm_80", 128): Config(64, 64, 16, 8, 2),
    ("dkdv_bias", "sm_90", 64): Config(128, 64, 32, 8, 1, tma=True),
    ("dkdv_bias", "sm_90", 96): Config(64, 32, 16, 8, 2, tma=True),
    ("dkdv_bias", "sm_90", 128): Config(64, 64, 16, 8, 2, tma=True),
    ("dq_bias", "sm_80", 64): Config(128, 64, 32, 8, 1),
    ("dq_bias", "sm_80", 128): Config(128, 16, 16, 8, 2),
    ("dq_bias", "sm_90", 64): Config(64, 64, 32, 4, 2, tma=True),
    ("dq_bias", "sm_90", 128): Config(128, 32, 32, 8, 2, tma=True),
    ("dq_bias", "sm_100", 64): Config(128, 64, 32, 8, 2, tma=True),
    ("dq_bias", "sm_100", 128): Config(128, 64, 32, 8, 1, tma=True),
    # A bias's gradient: a program owns rows x step of it. It has no boundary tiles, and reads none by TMA.
    ("dbias", "sm_80", 64): Config(128, 64, 0, 8, 1),
    ("dbias", "sm_80", 128): Config(32, 64, 0, 4, 1),
    ("dbias", "sm_80", 256): Config(16, 32, 0, 4, 1),
    ("dbias", "sm_90", 128): Config(64, 128, 0, 8, 1),
    ("dbias", "sm_90", 256): Config(64, 32, 0, 8, 1),
    ("dbias", "sm_100", 64): Config(128, 64, 0, 8, 1),
    ("dbias", "sm_100", 128): Config(64, 128, 0, 8, 1),
    ("dbias", "sm_100", 256): Config(32, 64, 0, 8, 1),
    ("dbias", "gfx942", 128): Config(64, 64, 0, 4, 1),
    ("dbias", "gfx942", 256): Config(32, 32, 0, 4, 1),
    ("dbias", "interpret", 256): Config(128, 128, 0, 4, 1),
    # fp32 on any GPU: three tf32 products for one need small tiles, or registers spill.
    ("forward", "fp32", 32): Config(64, 32, 16, 4, 2),
    ("forward", "fp32", 64): Config(32, 16, 16, 4, 1),
    ("forward", "fp32", 128): Config(16, 0, 32, 8, 1),
    ("forward", "fp32", 256): Config(16, 0, 16, 8, 1),
    ("dkdv", "fp32", 64): Config(32, 16, 16, 4, 1),
    ("dkdv", "fp32", 128): Config(16, 16, 16, 8, 1),
    ("dkdv", "fp32", 256): Config(16, 16, 16, 4, 1),
    ("dq", "fp32", 32): Config(64, 32, 16, 4, 2),
    ("dq", "fp32", 64): Config(32, 16, 16, 4, 1),
    ("dq", "fp32", 256): Config(16, 16, 16, 4, 1),
    ("forward_bias", "fp32", 32): Config(64, 32, 16, 4, 2),
    ("forward_bias", "fp32", 64): Config(16, 0, 16, 4, 1),
    ("dkdv_bias", "fp32", 32): Config(32, 16, 16, 4, 1),
    ("dkdv_bias", "fp32", 64): Config(16, 16, 16, 4, 1),
    ("dq_bias", "fp32", 32): Config(64, 32, 16, 4, 1),
    ("dq_bias", "fp32", 64): Config(16, 16, 16, 4, 1),
    ("dbias", "fp32", 32): Config(32, 32, 0, 4, 1),
    ("dbias", "fp32", 64): Config(16, 32, 0, 4, 1),
    ("dbias", "fp32", 256): Config(16, 32, 0, 8, 1),
}
STATISTICS_ROWS = 32


def config_of(kernel: str, arch: str, channels: int, dtype: torch.dtype) -> Config:
    """The block sizes that a launch takes, by the wider of a head's D and E; with a bias the plain kernel's, where
    there are none of its own."""
    if dtype == torch.float32 and arch != "interpret":
        arch = "fp32"
    elif ("forward", arch, 256) not in CONFIGS:
        arch = relative(arch)

    def widths(kernel: str) -> list[int]:
        return [c for k, a, c in CONFIGS if (k, a) == (kernel, arch) and c >= channels]

    if not widths(kernel):
        kernel = kernel.removesuffix("_bias")
    return CONFIGS[kernel, arch, min(widths(kernel))]


@dataclass(frozen=True)
class Call:
    """The tensors of one call as matrices [rows, heads * channels], and what every kernel is told about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts_q: Tensor | None
    starts_k: Tensor | None
    heads: int
    kv_heads: int
    D: int
    E: int
    num_sequences: int
    len_q: int  # of every sequence; of packed ones all rows
    len_k: int
    scale: float
    left: int
    right: int
    softcap: float | None
    bias: Tensor | None = None  # [N, queries, keys], contiguous

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor | None, starts_k: Tensor | None,
        scale: float, left: int, right: int, softcap: float | None, bias: Tensor | None = None,
    ) -> "Call":  # fmt: skip
        packed = starts_q is not None
        starts_q, starts_k, bias = (None if x is None else x.contiguous() for x in (starts_q, starts_k, bias))
        return cls(
            matrix(q), matrix(k), matrix(v), starts_q, starts_k, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1],
            len(starts_q) - 1 if starts_q is not None else q.shape[0],
            q.shape[0 if packed else 1], k.shape[0 if packed else 1], scale, left, right, softcap, bias,
        )  # fmt: skip

    @property
    def useful(self) -> bool:
        """Whether any query can see any key, so that there is something to launch."""
        return self.q.numel() > 0 and self.k.numel() > 0 and self.num_sequences > 0

    def config(self, kernel: str, arch: str) -> Config:
        """The block sizes of a kernel. A bias takes registers, so kernels that read one have rows of their own."""
        kind = f"{kernel}_bias" if self.bias is not None and kernel != "dbias" else kernel
        return config_of(kind, arch, max(self.D, self.E), self.q.dtype)

    def launch(self, name: str, kernel: Any, arch: str, streamed: dict[str, Tensor], **own: Any) -> Launch:
        """A launch of the forward, dkdv or dq kernel. streamed: the matrices that its loop reads, by name; own: what
        other kernels do not have."""
        config = self.config(name, arch)
        over_keys = name == "dkdv"
        rows, starts = (self.k, self.starts_k) if over_keys else (self.q, self.starts_q)
        length, heads = (self.len_k, self.kv_heads) if over_keys else (self.len_q, self.heads)
        block_d, block_e = next_power_of_2(self.D), next_power_of_2(self.E)
        blocks = {"q": block_d, "k": block_d, "v": block_e, "do": block_e}
        tiles = {f"{x}_tiles": tiles_of(streamed[x], config.step, blocks[x]) if config.tma else None for x in streamed}
        if block_d != self.D or block_e != self.E or None in tiles.values():
            tiles = dict.fromkeys(tiles)  # a tile wider than a head would reach into the next one
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, **own, **tiles, **self.facts(arch),
            "ROWS": config.rows, "STEP": config.step, "EDGE": config.edge,
        }  # fmt: skip
        if starts is None:
            grid = (num_tiles(length, config.rows), heads, self.num_sequences)
        else:
            grid = (len(rows) // config.rows + self.num_sequences + 1, heads, 1)
        return Launch(kernel, grid, arguments, config.warps, config.stages)

    def facts(self, arch: str) -> dict[str, Any]:
        """What every kernel but that of the statistics is told. Without a bias they are compiled without it."""
        queries, keys = (None, None) if self.bias is None else self.bias.shape[1:]
        return {
            "starts_q": self.starts_q, "starts_k": self.starts_k,
            "scale": self.scale, "softcap": self.softcap, "q_stride": self.q.stride(0), "k_stride": self.k.stride(0),
            "v_stride": self.v.stride(0), "bias": self.bias, "bias_queries": queries, "bias_keys": keys,
            "total_q": len(self.q), "len_q": self.len_q, "len_k": self.len_k,
            "left": self.left, "right": self.right, "num_sequences": self.num_sequences,
            "group": self.heads // self.kv_heads, "D": self.D, "E": self.E,
            "BLOCK_D": next_power_of_2(self.D), "BLOCK_E": next_power_of_2(self.E), "PRECISION": precision(arch),
        }  # fmt: skip

    def forward(self, arch: str, o: Tensor, lse: Tensor) -> Launch:
        streamed = {"k": self.k, "v": self.v}
        return self.launch("forward", attention_forward_kernel, arch, streamed, o=o, lse=lse)

    def statistics(
        self, arch: str, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, statistics: Tensor
    ) -> Launch:
        tensors = {"o": o, "do": do, "lse": lse, "dlse": dlse, "statistics": statistics}
        sizes = {"total_q": len(o), "E": self.E, "BLOCK_E": next_power_of_2(self.E), "ROWS": STATISTICS_ROWS}
        return Launch(
            attention_statistics_kernel, (num_tiles(len(o), STATISTICS_ROWS), self.heads), tensors | sizes, 4, 1
        )

    def dkdv(
        self, arch: str, do: Tensor, statistics: Tensor, dk: Tensor, dv: Tensor, fused: bool = False
    ) -> Launch:  # fmt: skip
        """dk, dv: contiguous; fused: columns of a contiguous gradient of q, k and v."""
        own = {"do": do, "statistics": statistics, "dk": dk, "dv": dv, "FUSED": fused}
        return self.launch("dkdv", attention_dkdv_kernel, arch, {"q": self.q, "do": do}, **own)

    def dbias(self, arch: str, do: Tensor, statistics: Tensor, dbias: Tensor) -> Launch:
        """dbias: contiguous."""
        config = self.config("dbias", arch)
        assert self.bias is not None
        heads, queries, keys = self.bias.shape
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, "do": do, "statistics": statistics, "dbias": dbias,
            **self.facts(arch), "ROWS": config.rows, "STEP": config.step,
        }  # fmt: skip
        grid = (num_tiles(keys, config.step), num_tiles(queries, config.rows), heads)
        return Launch(attention_dbias_kernel, grid, arguments, config.warps, config.stages)

    def dq(self, arch: str, do: Tensor, statistics: Tensor, dq: Tensor, fused: bool = False) -> Launch:
        own = {"do": do, "statistics": statistics, "dq": dq, "FUSED": fused}
        return self.launch("dq", attention_dq_kernel, arch, {"k": self.k, "v": self.v}, **own)


def outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for o and lse, as `attention_op` returns them."""
    rows = math.prod(q.shape[:-2])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[-2], rows, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches of MODELS by name, on tensors without storage, as the operators make them on a GPU of this kind."""
    specs: dict[str, Launch] = {}
    for sizes in MODELS.values():
        specs |= aot_launches(arch, sizes) | aot_launches(arch, sizes, bias=True)
    return specs | aot_launches(arch, LLAMA, packed=True)


def aot_launches(
    arch: str, sizes: Sizes, packed: bool = False, softcap: float | None = None, bias: bool = False
) -> dict[str, Launch]:
    """The launches of a model's attention: causal over 2 x 4096 tokens, or packed sequences with a window, or an
    encoder's with a bias of the same dtype."""
    dtype, heads, kv_heads, channels = sizes.torch_dtype, sizes.heads, sizes.kv_heads, sizes.head_dim
    counts = (heads, kv_heads, kv_heads)
    with torch.device("meta"):
        shape = (8192,) if packed else (2, 4096)
        q, k, v = (torch.empty(*shape, n, channels, dtype=dtype) for n in counts)
        fused = torch.empty(8192, sum(counts) * channels, dtype=dtype).split([n * channels for n in counts], 1)
        starts = torch.empty(9, dtype=torch.int32) if packed else None
        o, lse = outputs(q, v)
        statistics = lse.new_empty(2, *lse.shape)
        biases = torch.empty(heads, 4096, 4096, dtype=dtype) if bias else None
    left, right = 1024 if packed else UNLIMITED, UNLIMITED if bias else 0
    call = Call.of(q, k, v, starts, starts, channels**-0.5, left, right, softcap, biases)
    do, o = matrix(o), matrix(o)
    size = f"d{channels}" + ("_packed" if packed else "") + ("_softcap" if softcap else "") + ("_bias" if bias else "")
    launches = {
        f"attention_fwd_{size}" + ("" if packed or bias else "_causal"): call.forward(arch, o, lse),
        f"attention_dkdv_{size}": call.dkdv(arch, do, statistics, matrix(k), matrix(v)),
        f"attention_dkdv_{size}_fused": call.dkdv(arch, do, statistics, fused[1], fused[2], fused=True),
        f"attention_dq_{size}": call.dq(arch, do, statistics, matrix(q)),
        f"attention_dq_{size}_fused": call.dq(arch, do, statistics, fused[0], fused=True),
    }
    if biases is not None:
        launches[f"attention_dbias_{size}"] = call.dbias(arch, do, statistics, biases)
    elif not packed:
        for name, dlse in ((size, lse), (f"{size}_fused", None)):
            launches[f"attention_statistics_{name}"] = call.statistics(arch, o, do, lse, dlse, statistics)
    return launches
