"""Attention with heads of 128 to 256 channels in 16 bits."""

from experiments.gpu.attention import ENVIRONMENT, PACKED, Case, attention_section
from experiments.gpu.section import Section

CASES = [
    Case("bf16", 128, 8, 2, 1024),
    Case("bf16", 128, 8, 2, PACKED, PACKED),
    Case("bf16", 128, 8, 1, 1000, window=(256, 0)),
    Case("bf16", 128, 8, 8, 300, 777, causal=False),
    Case("bf16", 128, 8, 2, 777, 300),
    Case("bf16", 128, 8, 2, (5, 200, 64), (300, 100, 64), window=(70, None)),
    Case("bf16", 128, 8, 2, 1000, softcap=30.0),
    Case("bf16", 256, 8, 2, 1000),
    Case("bf16", 192, 8, 8, 777, E=128),
    Case("bf16", 128, 8, 2, 513, offset=1),
    Case("bf16", 256, 8, 1, PACKED, PACKED, window=(33, 0)),
    Case("bf16", 192, 8, 1, 300, 1000, causal=False, window=(100, 50)),
    Case("bf16", 128, 8, 2, 1000, fused=True),
    Case("bf16", 128, 8, 2, PACKED, window=(200, 0), fused=True),
    Case("bf16", 128, 8, 2, PACKED, PACKED, causal=False, bias=True),
]
REHEARSED = [Case("bf16", 16, 2, 1, 20), Case("bf16", 16, 2, 2, (1, 9, 0, 7), (1, 9, 0, 7))]
REHEARSED += [Case("bf16", 16, 2, 1, (1, 9, 0, 7), fused=True)]

SECTION = Section(
    "attention128", wave=2, seconds=100, run=lambda run: attention_section(run, CASES, REHEARSED),
    environment=ENVIRONMENT,
)  # fmt: skip
