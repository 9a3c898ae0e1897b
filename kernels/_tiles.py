"""Tiles of a matrix product: their order, their loads, and the loop over K that every fused product shares.

Shape letters: M rows, K summed, N columns.
"""

from megapar.kernels._common import cdiv, device_function, dot, tl


@device_function
def tile_at(number, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of an output tile. GROUP rows of tiles go together, so that their b stays in cache."""
    rows, columns = cdiv(M, ROWS), cdiv(N, COLUMNS)
    first = number // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    inside = number % (GROUP * columns)
    return (first + inside % height) * ROWS, inside // height * COLUMNS


@device_function
def load_block(matrix, row, column, stride, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile [ROWS, COLUMNS] of a matrix through addresses; zeros outside it."""
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    return tl.load(matrix + rows.to(tl.int64) * stride + columns, mask=inside, other=0.0)


@device_function
def load_operand(
    matrix, tiles, row, column, stride, num_rows, num_columns,
    BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, COLUMNS] of an operand [num_rows, num_columns], zeros outside it.

    BY_ROW: its rows lie together in memory, else its columns. tiles: its TMA descriptor, or None.
    """
    if BY_ROW:
        if tiles is not None:
            return tiles.load([row, column])
        else:
            return load_block(matrix, row, column, stride, num_rows, num_columns, ROWS, COLUMNS)
    else:
        if tiles is not None:
            return tiles.load([column, row]).trans()
        else:
            return load_block(matrix, column, row, stride, num_columns, num_rows, COLUMNS, ROWS).trans()


@device_function
def tile_product(
    a, b, a_tiles, b_tiles, row, column, M, N, K, a_stride, b_stride,
    A_BY_ROW: tl.constexpr, B_BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of a @ b, [ROWS, COLUMNS] in fp32: the loop over K that every fused product shares."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, K, STEP):
        left = load_operand(a, a_tiles, row, k, a_stride, M, K, A_BY_ROW, ROWS, STEP)
        right = load_operand(b, b_tiles, k, column, b_stride, K, N, B_BY_ROW, STEP, COLUMNS)
        product = dot(left, right, product, PRECISION)
    return product


@device_function
def quarters_of(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in four parts, so that what an epilogue moves through shared memory is small."""
    left, right = tl.split(tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
    first, second = tl.split(left.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1))
    third, fourth = tl.split(right.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1))
    return first, second, third, fourth
