"""The reader of machine code, on a loop that can be counted by hand; and the command's files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megapar.cli import main
from megapar.inspect import amdgcn, sass
from megapar.inspect.compile import Figures, specs_of
from megapar.inspect.table import table

# Two products of 64x128x16 for each warp group, the second one waited for after two of the four other instructions.
LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   FFMA R5, R6, R7, R8 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   IADD3 R2, R2, 0x80, RZ ;
.L_x_2:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0090*/              @!P0 BRA `(.L_x_2) ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   STL [R1], R5 ;
        /*00c0*/                   EXIT ;
"""


def test_a_loop_by_hand() -> None:
    instructions, labels = sass.parse(LOOP)
    (loop,) = sass.innermost_loops(instructions, labels)
    assert loop.count() == {"load": 1, "mma": 2, "fma": 1, "mufu": 1, "barrier": 1, "alu": 1, "control": 1}
    found = sass.bounds(loop, "sm_90", 8, {})
    assert found is not None
    # Two warp groups: 2 * 2 products of 2 * 64 * 128 * 16 FLOPs at 4096 a cycle.
    assert found.cycles["mma"] == 2 * 2 * 2 * 64 * 128 * 16 / 4096
    assert found.cycles["mufu"] == 8 * 32 / 16
    assert found.cycles["issue"] == 8 * 8 / 4
    # Operands in shared memory: both matrices of the first, [64, 16] and [128, 16], the right one of the second.
    assert found.cycles["smem"] == 2 * (64 + 128 + 128) * 32 / 128
    assert found.perfect == 1.0 and found.limit == "mma"
    # Of the load, the FFMA, the MUFU and the IADD3 two are issued while the products run.
    assert found.overlap == 0.5
    assert found.serial == 256 / (256 + 16)
    assert found.lockstep == 256 / (256 + 0.5 * 16)


def test_older_tensor_cores() -> None:
    """HMMA.16816 is 4096 FLOPs of one warp; tf32 runs at half the rate."""
    for opcode, flops in (("HMMA.16816.F32.BF16", 4096), ("HMMA.1688.F32.TF32", 2 * 2048)):
        text = LOOP.replace("HGMMA.64x128x16.F32.BF16", opcode)
        loop = sass.innermost_loops(*sass.parse(text))[0]
        found = sass.bounds(loop, "sm_80", 4, {})
        assert found is not None and found.cycles["mma"] == 2 * 4 * flops / 2048
        assert found.overlap is None and found.lockstep is None


def test_amd_code() -> None:
    text = """
    kernel:
      s_mov_b32 s0, 0
    .LBB0_1:
      global_load_dwordx4 v[0:3], v[4:5], off
      v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
      v_exp_f32_e32 v1, v1
      s_cbranch_scc1 .LBB0_1
      s_endpgm
    .vgpr_count:     40
    .vgpr_spill_count: 2
    """
    compiled = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=1024))
    assert amdgcn.figures(compiled) == {
        "registers": 40,
        "spill_bytes": 8,
        "shared_bytes": 1024,
        "mma": "v_mfma_f32_32x32x8_bf16_1k",
        "widest_load": 128,
        "loop": {"load": 1, "mma": 1, "mufu": 1, "scalar": 1},
    }


def test_the_table_shows_what_is_wrong() -> None:
    rows = table(
        [
            Figures("a", "sm_90", error="CompileError: no"),
            Figures("b", "sm_90", registers=255, spill_bytes=8, shared_bytes=256 << 10, loop={"mma": 4, "alu": 6}),
        ]
    ).splitlines()
    assert "error: CompileError: no" in rows[1]
    assert "256/227 over!" in rows[2] and "none" in rows[2] and "4/0/0/6" in rows[2]


def test_specs_are_written_and_nothing_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "specs.json"
    assert main(["kernels", f"specs={path}", "targets=[sm_90,gfx942]"]) == 0
    entries = json.loads(path.read_text())
    assert {entry["target"] for entry in entries} == {"cuda:90"}
    names = [entry["name"] for entry in entries]
    assert {"attention_fwd_d128_causal", "attention_dkdv_d64", "attention_dq_d128", "attention_fwd_d128_packed"} <= {
        *names
    }
    assert len(names) == len(set(names)) == len(specs_of(None, ["sm_90"]))
    forward = entries[names.index("attention_fwd_d128_causal")]
    assert Path(forward["kernel"].split(":")[0]).parts[-2:] == ("attention", "forward.py")
    assert forward["signature"]["k_tiles"] == "tensordesc<bf16[128,128]>" and forward["constexprs"]["softcap"] is None
