"""The table that `megapar kernels` prints."""

from megapar.inspect.compile import TMA_BITS, Figures

LEGEND = """\
regs: registers of a thread; spill: bytes of it that went to memory; shared: KB of a thread block, of its limit
load: widest of a thread; loop: instructions of the hottest loop, and of them mma, special functions, fp32, other
bound: share of the tensor cores' peak that the loop could reach if all units overlapped, and the unit in its way;
serial: if tensor cores waited for the rest; lockstep: with the overlap that the code has (sm_90)
static figures of a throughput model: they order variants of a kernel and predict no time"""
HEADER = (
    "kernel",
    "target",
    "regs",
    "spill",
    "shared",
    "mma",
    "load",
    "loop",
    "mix",
    "bound",
    "serial",
    "overlap",
    "lockstep",
)


def table(figures: list[Figures]) -> str:
    """One line for each kernel on each target, and what the columns mean."""
    rows = [HEADER, *(_row(one) for one in figures)]
    widths = [max(len(row[column]) for row in rows if len(row) == len(HEADER)) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([*lines, "", LEGEND])


def _row(one: Figures) -> tuple[str, ...]:
    if one.error:
        return one.name, one.target, f"error: {one.error}"
    loop = one.loop
    mix = "/".join(
        str(number)
        for number in (
            loop.get("mma", 0),
            loop.get("mufu", 0),
            loop.get("fma", 0) + loop.get("valu", 0),
            sum(loop.values()) - sum(loop.get(unit, 0) for unit in ("mma", "mufu", "fma", "valu")),
        )
    )
    over = " over!" if one.shared_bytes > one.shared_limit else ""
    return (
        one.name,
        one.target,
        str(one.registers),
        str(one.spill_bytes),
        f"{one.shared_bytes / 1024:.0f}/{one.shared_limit >> 10}{over}",
        one.mma or "none",
        "TMA" if one.widest_load == TMA_BITS else str(one.widest_load),
        str(sum(loop.values())),
        mix,
        "" if one.perfect is None else f"{one.perfect:.2f} {one.limit}",
        _share(one.serial),
        _share(one.overlap),
        _share(one.lockstep),
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
