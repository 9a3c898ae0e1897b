"""The compiled kernels' instructions are those whose hashes are in `kernels.json`.

A change that is meant to change them: `make replay-kernels`. `tests/inspect/test_compiled.py` says whether it is good.
"""

import json

import pytest

from tests.plan.kernels import HASHES, digest, hashes, instructions

TEXT = """
//--------------------- .text.kernel --------------------------
        .section        .text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        //## File "/somewhere/kernel.py", line 7
        /*0010*/              @!P0 BRA `(.L_x_0) ;
"""


@pytest.mark.slow
def test_the_same_instructions() -> None:
    golden, found = json.loads(HASHES.read_text(encoding="utf-8")), hashes()
    assert found["triton"] == golden["triton"], "another compiler makes other code: make replay-kernels, from old code"
    changed = sorted(name for name in golden.keys() | found.keys() if golden.get(name) != found.get(name))
    assert not changed, f"{len(changed)} of {len(golden) - 1} kernels changed; if they should: make replay-kernels"


def test_what_is_hashed() -> None:
    assert instructions(TEXT) == ["MOV R1, c[0x0][0x28] ;", ".L_x_0:", "@!P0 BRA `(.L_x_0) ;"]
    assert digest(TEXT) == digest(TEXT.replace("/somewhere/", "/elsewhere/").replace("line 7", "line 8"))
    assert digest(TEXT) != digest(TEXT.replace("0x28", "0x30"))
