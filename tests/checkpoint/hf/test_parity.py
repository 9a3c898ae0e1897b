"""Logits of Hugging Face folders are transformers' in fp32, in one process and in layouts.

The bound is 1e-5 of the largest logit; sums in another order reach 1e-6 (seven layers).
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megapar
from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from megapar.library.batch import side_inputs, source_inputs, whole
from megapar.library.hf import from_hf
from megapar.library.logits import gather_logits
from megapar.schedule.lower import forward_only, lower
from tests.checkpoint.hf.models import MODELS, build, distance, reference, save

BOUND = 1e-5
LAYOUTS = ("tp2", "pp2", "tp2pp2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every model, by its name, in several files each."""
    root = tmp_path_factory.mktemp("hf")
    for name in MODELS:
        save(build(name), root / name)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_in_one_process(name: str, folders: Path) -> None:
    ref, model = reference(name), megapar.from_hf(folders / name).eval()
    assert len(list((folders / name).glob("*.safetensors"))) > 3
    for side, mask in ref.masks.items():
        given = None if side == "none" else mask
        inputs: dict[str, Any] = {"attention_mask": given, "token_types": ref.types}
        if ref.source is not None:
            inputs = {"source": ref.source, "source_mask": given}
        with torch.no_grad():
            found = model(ref.ids, **inputs)
        if ref.pooled is not None:
            found, pooled = found
            assert side != "right" or (pooled - ref.pooled).abs().max() < BOUND
        assert distance(found, ref, side) < BOUND, side


def logits_of_a_rank(
    rank: int, world_size: int, folder: str, layout: str, ids: Any, mask: Any, types: Any, source: Any
) -> Any:
    """(logits or hidden states on the last stage, bytes that were read of the weights)."""
    model = from_hf(folder, layout=layout, device="cpu").eval()
    mesh, placement = model.part.mesh, model.part.schedule.placement
    batch = whole(ids, 0) | side_inputs(ids, mask if source is None else None, types)
    batch |= source_inputs(ids, source, mask)

    def last(outputs: Any, batch: Any) -> Any:
        if "scores" in outputs:
            return outputs["scores"]
        if "hidden" in outputs:
            return outputs["hidden"].view(*ids.shape, -1)
        return gather_logits(outputs["logits"], model.config.model.vocab_size or 0, mesh["tp"]).view(*ids.shape, -1)

    schedule = lower(forward_only(placement, 1), len(placement), 1)
    found = model.executor.run(schedule, [batch], last)
    held = sum(buffer.numel() * 4 for buffer in model.part.buffers.params)
    read = model.read_bytes
    model.close()
    return (found[0] if found else None), read, held


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_in_a_layout(name: str, layout: str, folders: Path, pool: WorkerPool) -> None:
    """And a rank reads no more than it holds: padding of buckets hides less than the 1.1 that is allowed."""
    ref = reference(name)
    side = "right"
    arguments = (str(folders / name), layout, ref.ids, ref.masks[side], ref.types, ref.source)
    results = pool.run(logits_of_a_rank, Layout.parse(layout).world, *arguments)
    found = [logits for logits, _, _ in results if logits is not None]
    assert len(found) == Layout.parse(layout)["tp"]
    for logits in found:
        assert distance(logits, ref, side) < BOUND
    assert all(0 < read <= 1.1 * held for _, read, held in results)


BLOCKED = """
import sys
for name in ("transformers", "peft", "lm_eval"):
    sys.modules[name] = None
import torch, megapar
ids, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = megapar.from_hf(sys.argv[1]).eval()(ids)
assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
"""


def test_without_transformers(folders: Path, tmp_path: Path) -> None:
    ref = reference("gemma3")
    torch.save((ref.ids, ref.expected["none"]), tmp_path / "expected")
    command = [sys.executable, "-c", BLOCKED, str(folders / "gemma3"), str(tmp_path / "expected")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
