"""The one-process run against a plain torch model that shares no code with it."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from megapar.optim.schedule import learning_rate
from megapar.train.trainer import Trainer
from tests import reference
from tests.tiny import GPT2, LLAMA, tiny_config

STYLES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": LLAMA | {"model.tied": True},
    "gemma": LLAMA | {"model.activation": "geglu", "model.tied": True},
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"model.tied": False},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_three_steps(style: str, recompute: str, tokens: str) -> None:
    """Bounds: verify's for fp64 (gradients 1e-11 and loss 1e-13 relative, values 1e-8 of the learning rate)."""
    loop = {"train.steps": 3, "train.recompute": recompute, "optim.clip_grad": 0.3, "optim.warmup_steps": 1}
    config = tiny_config(tokens, **STYLES[style] | loop)
    trainer = Trainer(config, 0)
    model = asdict(config.model)
    sizes = {key: model[key] for key in ("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab_size", "layers")}
    switches = {
        "layernorm": model["norm"] == "layernorm",
        "rope": model["position"] == "rope",
        "activation": model["activation"],
        "positions": config.train.seq_length,
    }
    same = {key: model[key] for key in ("bias", "tied", "norm_eps", "rope_theta")}
    windows = [
        torch.cat([torch.cat([b["ids"], b["labels"][:, -1:]], 1) for b in trainer.task.batches(step)])
        for step in (1, 2, 3)
    ]
    rates = [learning_rate(config.optim, step, 3) for step in (1, 2, 3)]
    history = reference.train(
        sizes | switches | same, tensors(trainer, trainer.buffers.params), windows, asdict(config.optim), rates
    )
    seen: list[dict[str, torch.Tensor]] = []
    for step, expected in enumerate(history, start=1):
        found = trainer.step(step, lambda: seen.append(tensors(trainer, trainer.sync.owned)))
        assert found.loss == pytest.approx(expected["loss"], rel=1e-13)
        assert found.result.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-11)
        gradients, weights = seen[-1], tensors(trainer, trainer.buffers.params)
        assert gradients.keys() == expected["grads"].keys()
        count = sum(gradient.numel() for gradient in gradients.values())
        for name, gradient in expected["grads"].items():
            scale = max(gradient.abs().max().item(), 1e-3 * expected["grad_norm"] / count**0.5)
            assert (gradients[name] - gradient).abs().max().item() / scale < 1e-11, name
            change = (weights[name] - expected["weights"][name]).abs().max().item()
            assert change / config.optim.lr < 1e-8, name


def tensors(trainer: Trainer, buckets: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the logical tensors in the buckets of a one-process run."""
    return {held.piece.record.name: held.view(buckets).clone() for held in trainer.buffers.held()}
