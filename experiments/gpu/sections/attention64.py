"""Attention with heads of 64 to 96 channels in 16 bits."""

from experiments.gpu.attention import ENVIRONMENT, PACKED, Case, attention_section
from experiments.gpu.section import Section

CASES = [
    Case("bf16", 64, 8, 8, 1024),
    Case("bf16", 64, 8, 2, PACKED, PACKED),
    Case("bf16", 80, 8, 2, 1000),
    Case("bf16", 64, 8, 1, 1000, 300, causal=False, window=(100, 50)),
    Case("bf16", 96, 8, 1, 777, window=(128, 0)),
    Case("bf16", 64, 8, 2, 1000, softcap=20.0),
    Case("bf16", 80, 8, 8, PACKED, PACKED),
    Case("bf16", 96, 8, 8, 300, 777),
    Case("bf16", 64, 8, 2, 513, offset=1),
    Case("fp16", 64, 8, 2, 1000),
    Case("bf16", 64, 8, 8, 777, fused=True),
    Case("bf16", 80, 8, 2, 1000, fused=True),
    Case("bf16", 64, 8, 2, 777, 1000, causal=False, bias=True),
]
REHEARSED = [Case("bf16", 16, 2, 1, 12, softcap=5.0, offset=1), Case("fp16", 20, 2, 2, 9)]

SECTION = Section(
    "attention64", wave=2, seconds=100, run=lambda run: attention_section(run, CASES, REHEARSED),
    environment=ENVIRONMENT,
)  # fmt: skip
