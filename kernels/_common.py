"""What the Triton kernels share: the device functions that they inline, and the description of a launch.

Tensors are matrices to a kernel: a row for every position of every sequence, and in it the channels of one head after
another. So a tile begins at a row and a column, and rows of a sequence are counted from the first of all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class _Absent:
    """Stands for Triton where there is no Triton: kernels can be defined, and none can run."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = _Absent()

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # fixed here: triton.jit reads it when a kernel is defined
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FARTHEST = 1 << 24  # elements from row to row of `matrix`: `tile_pointers` counts a tile's 128 rows in 32 bits


def device_function(function: Any) -> Any:
    """triton.jit for what kernels call. The interpreter gets it as it is: each call through triton.jit would have it
    patch the whole language anew, a millisecond that no arithmetic of a small tile takes."""
    return function if INTERPRETED else triton.jit(function)


@device_function
def cdiv(x, y):
    """x / y rounded up. Triton's own is a function of triton.jit."""
    return (x + y - 1) // y


@device_function
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32; a @ b where acc is None.

    The interpreter multiplies bf16 as if its bits were integers, so there the operands become fp32 first. Products of
    two bf16 are exact in fp32, as they are in a tensor core.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@device_function
def cast(x, dtype: tl.constexpr):
    """fp32 x in another dtype, to nearest even. The interpreter would cut bf16 off: twice the error, and biased."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16  # of a denormal it makes 1e-38, not 0
        rounded = bits.to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@device_function
def tile_pointers(matrix, row, column, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of the tile [ROWS, BLOCK] of a matrix that begins in this row and column."""
    first = matrix + tl.cast(row, tl.int64) * stride + column
    return first + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK)[None, :]


@device_function
def tile_mask(row, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a tile that begins at `row` exist, [ROWS, BLOCK] or [ROWS, 1]."""
    mask = (row + tl.arange(0, ROWS) < end)[:, None]
    if CHANNELS != BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < CHANNELS)[None, :]
    return mask


@device_function
def load_tile(matrix, row, column, stride, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile. Rows from `end` on, and channels from CHANNELS on, are zeros and are not read."""
    mask = tile_mask(row, end, ROWS, CHANNELS, BLOCK)
    return tl.load(tile_pointers(matrix, row, column, stride, ROWS, BLOCK), mask=mask, other=0.0)


@device_function
def load_full_tile(matrix, tiles, row, column, stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of which every row exists. tiles: the matrix's TMA descriptor; None: read through addresses."""
    if tiles is not None:
        return tiles.load([row, column])
    else:
        pointers = tile_pointers(matrix, row, column, stride, ROWS, BLOCK)
        if CHANNELS != BLOCK:
            return tl.load(pointers, mask=(tl.arange(0, BLOCK) < CHANNELS)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@device_function
def store_tile(matrix, tile, row, column, stride, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the elements of a tile that exist, in the matrix's dtype."""
    mask = tile_mask(row, end, ROWS, CHANNELS, BLOCK)
    pointers = tile_pointers(matrix, row, column, stride, ROWS, BLOCK)
    tl.store(pointers, cast(tile, matrix.dtype.element_ty), mask=mask)


@device_function
def row_tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows [ROWS, 1] in 64 bits, columns [1, COLUMNS], which elements exist) of this program of a grid of tiles."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows.to(tl.int64), columns, (rows < num_rows) & (columns < num_columns)


@device_function
def find_sequence(starts, num_sequences, ROWS: tl.constexpr):
    """(sequence, tile inside it) of this program, for packed sequences that begin at starts [num_sequences + 1].

    The tiles of sequence b are numbered from starts[b] // ROWS + b: no two sequences meet, although each may end in a
    part of a tile, and the number needs no sum over the sequences before. A grid of total // ROWS + num_sequences + 1
    holds them all; programs in the gaps find a tile past the end of a sequence and have nothing to do. Whatever
    numbers starts holds, the sequence is one of them and the tile at least 0.
    """
    tile = tl.program_id(0)
    first, last = tl.cast(0, tl.int32), tl.cast(num_sequences, tl.int32)
    while first + 1 < last:
        middle = (first + last) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            first = middle
        else:
            last = middle
    begun = tl.maximum(tl.load(starts + first), 0) // ROWS + first
    return first, tl.maximum(tile - begun, 0)


@device_function
def sequence_rows(starts, sequence, num_rows):
    """(first row, length) of a packed sequence, none beyond num_rows whatever numbers starts holds."""
    first = tl.maximum(tl.load(starts + sequence), 0)
    end = tl.minimum(tl.load(starts + sequence + 1), num_rows)
    return first, tl.maximum(end - first, 0)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, ready to run, or to be compiled for a machine that is not here.

    arguments: every parameter of the kernel by name. A parameter that is None is a constant of the compilation.
    registers: the most that a thread may have, on NVIDIA's; None: what the hardware allows
    """

    kernel: Any  # triton.jit's
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        # Fusing multiply and add is Triton's default, and announced to change: said here, it can't change by itself.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def run(self) -> None:
        """Run it on the device of its tensors."""
        first = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(first):  # Triton launches on the current device, whatever its tensors' is
            self.kernel[self.grid](**self.arguments, **self.options)

    def metadata(self) -> dict[str, Any]:
        """What a profiler is told of it: name, flops16 or flops32, bytes. Runs nothing."""
        told = self.kernel.kwargs["launch_metadata"] if INTERPRETED else self.kernel.launch_metadata
        return told(self.grid, SimpleNamespace(name=self.kernel.fn.__name__), self.arguments)

    def specialisation(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """What the compiler is given, as a launch would have Triton derive it from the arguments.

        (types of the run-time parameters, values of the constants, parameters that are multiples of 16).
        """
        types, constants, divisible = {}, {}, []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                constants[name] = value
                continue
            types[name] = _type_of(value)
            whole = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
            if whole and not parameter.do_not_specialize:
                divisible.append(name)
        return types, constants, divisible


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _DTYPES[str(value.dtype)]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_DTYPES[str(value.base.dtype)]}[{','.join(map(str, value.block_shape))}]>"
    return "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


_DTYPES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.int32": "i32",
    "torch.int64": "i64",
}


@cache
def target_arch() -> str:
    """What kernels are launched for in this process: sm_90, gfx942, ..., or "interpret"."""
    if INTERPRETED:
        return "interpret"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]


def relative(arch: str) -> str:
    """The architecture of the table whose instructions and sizes suit another one."""
    return "sm_100" if arch == "sm_103" else "sm_80" if arch.startswith("sm_") else "gfx942"


def precision(arch: str) -> str:
    """How tensor cores multiply fp32: on NVIDIA as three tf32 products, which keeps 21 of fp32's 24 bits."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def overlaps_itself(x: Tensor) -> bool:
    """Whether several elements lie in one place, as after `expand`: nothing can be written there."""
    return any(length > 1 and stride == 0 for length, stride in zip(x.shape, x.stride(), strict=True))


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have memory in common. Columns beside each other in the same rows have not."""
    if x.data_ptr() > y.data_ptr():
        x, y = y, x
    reach = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
    distance = (y.data_ptr() - x.data_ptr()) // x.element_size()
    if distance >= reach:
        return False
    step, column = x.stride(0), distance % max(1, x.stride(0))
    same_rows = x.dim() == y.dim() == 2 and x.stride() == y.stride() == (step, 1) and x.dtype == y.dtype
    return not (same_rows and x.shape[1] <= column and column + y.shape[1] <= step)


def aligned_matrix(x: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised matrix [rows, columns] on the device and in the dtype of x, whose rows TMA can read.

    That needs rows that begin at a multiple of 16 bytes. Where they would not, as GPT-2's 50257 logits in 16 bits, they
    lie apart, at a multiple of 128 bytes.
    """
    if columns * x.element_size() % 16 == 0:
        return x.new_empty(rows, columns)
    line = 128 // x.element_size()
    return x.new_empty(rows, num_tiles(columns, line) * line)[:, :columns]


def matrix(x: Tensor) -> Tensor:
    """x [..., heads, channels] as [rows, heads * channels]: a view where a row's channels lie together, else a copy."""
    rows = rows_of(x.reshape(math.prod(x.shape[:-2]), math.prod(x.shape[-2:])))
    return rows if rows.stride(0) <= FARTHEST else rows.contiguous()


def tiles_of(matrix: Tensor, rows: int, channels: int) -> "TensorDescriptor | None":
    """TMA descriptor of a matrix for tiles [rows, channels]; None where the hardware can't read it so."""
    size = matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * size % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
    return TensorDescriptor.from_tensor(matrix, [rows, channels]) if aligned and matrix.numel() else None


def check_overflow(on: bool) -> None:
    """Whether the interpreter looks for overflow in every sum and product of whole numbers, as it does at first. That
    is 40% of its time; compiled code never looks."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=on)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x and statistics of it are kept in: at least fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """A matrix whose columns lie together; its rows may lie apart. A single column does, whatever its stride says."""
    if x.shape[1] == 1:
        return x.as_strided(x.shape, (x.stride(0), 1))
    return x if x.stride(1) == 1 else x.contiguous()


def check_gradient(
    h: Tensor, *likes: Tensor | None, statistics: tuple[Tensor, ...], weight: Tensor | None = None
) -> None:
    """Raise ValueError unless gradients are [T, H] as h, a norm's statistics [T] and its weight [H], all floating."""
    gradients, weights = [x for x in likes if x is not None], [] if weight is None else [weight]
    fits = h.dim() == 2 and all(x.shape == h.shape for x in gradients) and all(x.shape == h.shape[1:] for x in weights)
    fits = fits and all(x.shape == h.shape[:1] for x in statistics)
    if not fits or not floating(h, *gradients, *statistics, *weights):
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (*gradients, *statistics))
        said = "".join(f", weight {list(x.shape)} {x.dtype}" for x in weights)
        raise ValueError(
            f"h {list(h.shape)} {h.dtype}, gradients and statistics {shapes}{said}: need [T, H] and [T], of a weight "
            "[H], in floating dtypes"
        )


def floating(*tensors: Tensor) -> bool:
    return all(x.is_floating_point() for x in tensors)


def tells(flops: Callable[[dict[str, Any]], float]) -> Any:
    """launch_metadata, what a profiler is told, of a kernel that moves each byte once. flops: from its arguments."""

    def describe(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
        moved = sum(x.numel() * x.element_size() for x in args.values() if torch.is_tensor(x))
        return {"name": kernel.name, "flops32": flops(args), "bytes": moved}

    return describe


def num_tiles(length: int, rows: int) -> int:
    return -(-length // rows)


def next_power_of_2(number: int) -> int:
    """The block that holds this many channels: at least 16, the least that a tensor core multiplies."""
    return max(16, 1 << (number - 1).bit_length())
