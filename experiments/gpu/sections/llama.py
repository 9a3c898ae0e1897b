"""transformers' Llama of the 1.1B model's sizes, its layers by torch.compile, where transformers is installed."""

from types import ModuleType

import torch

from experiments.gpu.models import model_rates, sizes_of, timed_steps
from experiments.gpu.plain import update
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from experiments.gpu.table import read_rows

BESIDE = 1.05
RECOMPILES = 64  # each layer is a module of its own


def llama(run: Run) -> None:
    run.attempt("transformers with torch.compile", compiled, run)


def compiled(run: Run) -> None:
    import transformers

    timed(run, transformers)  # card-only: where it is installed


def timed(run: Run, transformers: ModuleType) -> None:  # card-only
    one = sizes_of(run)
    config = transformers.LlamaConfig(
        vocab_size=one.vocab, hidden_size=one.hidden, intermediate_size=one.ffn, num_hidden_layers=one.layers,
        num_attention_heads=one.heads, num_key_value_heads=one.kv_heads, head_dim=one.head_dim,
        max_position_embeddings=one.length, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch._dynamo.config.recompile_limit = RECOMPILES
    with torch.device(run.device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
        ids = torch.randint(0, one.vocab, (one.count, one.micro, one.length))
    if run.cuda:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(number: int) -> None:
        for window in ids:
            (model(input_ids=window, labels=window).loss / one.count).backward()
        update(model.parameters(), optimizer)

    seconds = timed_steps(run, step, 1, 3)
    model_rates(run, "transformers with torch.compile", one, seconds)
    rows = [row for row in read_rows(run.out / "accept.json") if row["check"] == "megapar: tokens"]
    ours = rows[-1]["value"] if rows and rows[-1]["value"] else float("nan")
    run.rate("megapar beside transformers with torch.compile", ours * seconds / one.tokens, "x", BESIDE)


SECTION = Section("llama", wave=7, seconds=80, run=llama, needs=("profile",))
