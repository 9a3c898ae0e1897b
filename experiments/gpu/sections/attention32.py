"""Attention in fp32, as three tf32 products."""

from experiments.gpu.attention import ENVIRONMENT, PACKED, Case, attention_section
from experiments.gpu.section import Section

CASES = [
    Case("fp32", 32, 4, 2, 512),
    Case("fp32", 64, 4, 4, 777),
    Case("fp32", 128, 4, 1, 512),
    Case("fp32", 64, 4, 2, PACKED, PACKED),
    Case("fp32", 64, 4, 2, 300, 777, window=(64, None)),
    Case("fp32", 64, 4, 2, 500, softcap=10.0),
    Case("fp32", 128, 4, 4, 300, causal=False),
    Case("fp32", 96, 4, 4, 300),
    Case("fp32", 256, 4, 2, 300),
    Case("fp32", 64, 4, 2, 300, fused=True),
    Case("fp32", 32, 4, 4, PACKED, fused=True),
    Case("fp32", 32, 4, 2, 300, 777, causal=False, bias=True),
    Case("fp32", 64, 4, 4, PACKED, PACKED, bias=True),
]
REHEARSED = [Case("fp32", 16, 2, 1, 15, 9, window=(4, None)), Case("fp32", 32, 2, 1, 7, causal=False)]
REHEARSED += [Case("fp32", 16, 2, 1, 9, fused=True), Case("fp32", 16, 2, 1, 9, 12, causal=False, bias=True)]

SECTION = Section(
    "attention32", wave=2, seconds=100, run=lambda run: attention_section(run, CASES, REHEARSED),
    environment=ENVIRONMENT,
)  # fmt: skip
