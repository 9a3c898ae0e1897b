"""What the compiler makes of the kernels, for GPUs that are not here.

compiled.json holds the figures of the last accepted compilation. After a change that is meant to change them:
`megapar kernels out=tests/inspect/compiled.json`, and look at the difference before it is committed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.inspect.compile import TARGETS as COMPILED_FOR
from megapar.inspect.compile import Figures, compile_all, spec_of, specs_of
from megapar.kernels import matmul
from megapar.kernels._common import Launch
from megapar.kernels.comm import matmul as fused
from megapar.kernels.comm.symmetric import described_use

GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("compiled.json").read_text())
TARGETS = [
    "sm_80",
    "sm_90",
    pytest.param("sm_100", marks=pytest.mark.slow),
    pytest.param("gfx942", marks=pytest.mark.slow),
]
MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# fp32 tiles of the smallest heads: too few rows for a warp group, so the older instruction does it
SMALL = {
    (f"sm_{n}", f"attention_{name}"): "HMMA"
    for n in (90, 100)
    for name in ("dkdv_d32", "dkdv_d32_fused", "dkdv_d32_bias", "dkdv_d32_bias_fused", "dbias_d32_bias")
}
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
    "attention_fwd_d128_bias": (0.03, 0.42),
    "attention_fwd_d64_bias": (0.12, 0.32),
    "attention_dkdv_d128_bias": (0.40, 0.48),
    "attention_dkdv_d64_bias": (0.15, 0.45),
    "attention_dq_d128_bias": (0.20, 0.54),
    "attention_dq_d64_bias": (0.20, 0.52),
}
FLOORS |= {f"{name}_fused": floors for name, floors in FLOORS.items() if "fwd" not in name}  # into one gradient
# sm_90: instructions of the loop over K, at most, at the full rate of the tensor cores
LONGEST = {
    **{f"matmul{kind}_14336": 110 for kind in ("", "_bias_gelu", "_input_grad", "_weight_grad")},
    **{f"matmul_dynamic{kind}_14336": 95 for kind in ("", "_bias_gelu", "_input_grad", "_weight_grad")},
    **{f"matmul_logits{kind}_50257": 112 for kind in ("", "_input_grad", "_weight_grad")},
} | {
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


def of_a_processor(one: Figures) -> tuple[int, int]:
    """(registers, bytes of shared memory) that a program takes of one of NVIDIA's: registers by eights of a thread."""
    return -(-one.registers // 8) * 8 * 32 * one.warps, one.shared_bytes + fused.RESERVED


@pytest.mark.more
@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90", TARGETS[2]])
def test_a_gathered_product_leaves_room_for_what_it_waits_for(target: str) -> None:
    """In every tile: a program of `push_rows` fits on a processor where one of the product's waits for its flag."""
    launches: dict[str, Launch] = {}
    for (arch, size), configs in matmul.CONFIGS.items():
        dtype = {2: torch.bfloat16, 4: torch.float32}[size]
        for config in configs if arch == target else ():
            with torch.device("meta"):
                x, w, y = (
                    torch.empty(4096, 4096, dtype=dtype),
                    torch.empty(4096, 512, dtype=dtype),
                    torch.empty(4096, 512),
                )
            use = described_use(target, 8, 1, 1)
            launches[f"push {config}"] = fused.push_rows(use, x[:512], config)
            launches[f"product {config}"] = fused.gathered_product(use, x, w, y.to(dtype), config, 132)
    found = compile_all([spec_of(name, launch, target) for name, launch in launches.items()])
    assert all(one.error is None and one.spill_bytes == 0 for one in found), found
    pushes, products = found[::2], found[1::2]
    assert len(products) == sum(len(configs) for (arch, _), configs in matmul.CONFIGS.items() if arch == target)
    for push, product in zip(pushes, products, strict=True):
        registers, shared = map(sum, zip(of_a_processor(push), of_a_processor(product), strict=True))
        assert registers <= fused.REGISTERS and shared <= fused.SHARED[target], (push, product)


def test_a_tile_that_leaves_no_room_is_refused() -> None:
    config = matmul.Config(128, 256, 64, 8, 5, tma=True)
    with pytest.raises(
        ValueError, match=r"^Config\(.*\) of torch.bfloat16 takes 240 KB .* sm_90 .*; use fewer stages$"
    ):
        fused.room_beside_push("sm_90", config, torch.bfloat16)
    assert fused.room_beside_push("sm_90", replace(config, stages=3), torch.bfloat16) == 216
    assert fused.room_beside_push("sm_86", matmul.CONFIGS["sm_80", 2][0], torch.bfloat16) == 216
    assert fused.room_beside_push("gfx942", config, torch.bfloat16) is None


def test_every_tile_of_a_matrix_product_is_compiled() -> None:
    for (arch, size), configs in matmul.CONFIGS.items():
        if arch in COMPILED_FOR:
            launches = [one for one in matmul.aot_specs(arch).values() if one.arguments["a"].element_size() == size]
            tiles = {(one.arguments["ROWS"], one.arguments["COLUMNS"], one.arguments["STEP"]) for one in launches}
            assert tiles == {(config.rows, config.columns, config.step) for config in configs}, (arch, size)


def test_16_bit_tiles_are_read_by_tma() -> None:
    tiles = [one for one in GOLDEN if one["target"] in ("sm_90", "sm_100") and one["mma"]]
    # Not fp32's, nor a bias's gradient, which has no loop over tiles.
    others = [one for one in tiles if "_d32" in one["name"] or one["name"].endswith(("_384", "_192"))]
    wide = [one for one in tiles if one not in others and "dbias" not in one["name"]]
    assert len(wide) == 2 * (25 + 20 + 6) and all(one["widest_load"] == 1024 for one in wide)
