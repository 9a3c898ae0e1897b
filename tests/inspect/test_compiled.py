"""What the compiler makes of the kernels, for GPUs that are not here.

compiled.json holds the figures of the last accepted compilation. After a change that is meant to change them:
`megapar kernels out=tests/inspect/compiled.json`, and look at the difference before it is committed.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megapar.inspect.compile import TARGETS as COMPILED_FOR
from megapar.inspect.compile import Figures, compile_all, specs_of
from megapar.kernels import matmul

GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("compiled.json").read_text())
TARGETS = [
    "sm_80",
    "sm_90",
    pytest.param("sm_100", marks=pytest.mark.slow),
    pytest.param("gfx942", marks=pytest.mark.slow),
]
MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# fp32 keys and values of the smallest heads: too few rows for a warp group, so the older instruction does it
SMALL = {("sm_90", "attention_dkdv_d32"): "HMMA", ("sm_100", "attention_dkdv_d32"): "HMMA"}
# sm_90: what the loop over full tiles must reach, (overlap, lockstep bound); docs/kernels.md compares it with others
FLOORS = {
    "attention_fwd_d128_causal": (0.75, 0.85),
    "attention_fwd_d128_packed": (0.75, 0.85),
    "attention_fwd_d64_causal": (0.70, 0.75),
    "attention_dkdv_d128": (0.90, 0.95),
    "attention_dkdv_d128_packed": (0.90, 0.95),
    "attention_dkdv_d64": (0.90, 0.85),
    "attention_dq_d128": (0.20, 0.75),
    "attention_dq_d128_packed": (0.20, 0.75),
    "attention_dq_d64": (0.20, 0.65),
}
# sm_90: instructions of the loop over K, at most, at the full rate of the tensor cores
LONGEST = {f"matmul{kind}_14336": 110 for kind in ("", "_bias_gelu", "_input_grad", "_weight_grad")} | {
    f"{kind}_{width}": 101
    for kind in ("product_push_to_all", "product_push_to_owner", "gathered_product")
    for width in (1792, 7168)
}


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> list[Figures]:
    return compile_all(specs_of(None, [request.param]))


@pytest.mark.more
@pytest.mark.parametrize("figures", TARGETS, indirect=True)
def test_compiled(figures: list[Figures]) -> None:
    """Compiled, in registers, within shared memory, on tensor cores, with wide loads, and as good as before.

    The same compiler makes the same code everywhere; the tolerances leave room for another patch release of it. A loop
    a tenth longer, or a bound 0.03 lower, is a change to look at.
    """
    golden = {one["name"]: one for one in GOLDEN if one["target"] == figures[0].target}
    assert {one.name for one in figures} == set(golden)
    for one in figures:
        where, expected = f"{one.name} on {one.target}", golden[one.name]
        assert one.error is None, where
        assert one.spill_bytes == 0 and "spill" not in one.loop, where
        assert one.shared_bytes <= one.shared_limit, where
        assert one.widest_load >= 128, where
        if one.name.startswith(("attention", "matmul", "product", "gathered")) and "statistics" not in one.name:
            assert one.mma.split(".")[0].startswith(SMALL.get((one.target, one.name), MMA[one.target])), where
        assert sum(one.loop.values()) <= 1.1 * sum(expected["loop"].values()), where
        for bound in ("perfect", "serial", "lockstep"):
            if expected[bound] is not None:
                assert getattr(one, bound) >= expected[bound] - 0.03, f"{where}: {bound}"
        if one.target == "sm_90" and one.name in LONGEST:
            assert sum(one.loop.values()) <= LONGEST[one.name] and one.perfect == 1.0, where
        if one.target == "sm_90" and one.name in FLOORS:
            for found, floor in zip((one.overlap, one.lockstep), FLOORS[one.name], strict=True):
                assert found is not None and found >= floor, where


def test_every_tile_of_a_matrix_product_is_compiled() -> None:
    for (arch, size), configs in matmul.CONFIGS.items():
        if arch in COMPILED_FOR:
            launches = [one for one in matmul.aot_specs(arch).values() if one.arguments["a"].element_size() == size]
            tiles = {(one.arguments["ROWS"], one.arguments["COLUMNS"], one.arguments["STEP"]) for one in launches}
            assert tiles == {(config.rows, config.columns, config.step) for config in configs}, (arch, size)


def test_16_bit_tiles_are_read_by_tma() -> None:
    tiles = [one for one in GOLDEN if one["target"] in ("sm_90", "sm_100") and one["mma"]]
    wide = [one for one in tiles if not one["name"].endswith(("_d32", "_d32_causal", "_384", "_192"))]  # those are fp32
    assert len(wide) == 2 * (9 + 9 + 6) and all(one["widest_load"] == 1024 for one in wide)
