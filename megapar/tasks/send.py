"""A step's micro-batches on their way to the device: once per step and not once per tensor and micro-batch."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megapar.pipeline.stage import Batch


def send(arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]], device: torch.device) -> list[Batch]:
    """Arrays [M, ...] -> M batches on the device, of views: batch m has every array's part m. Of parts that differ in
    length along dim 0 a list.

    To a GPU each array is one transfer from pinned memory, which the host does not wait for.
    """
    joined = {name: array if isinstance(array, np.ndarray) else np.concatenate(array) for name, array in arrays.items()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in joined.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    [count] = {len(array) for array in arrays.values()}
    parts = {
        name: tensor if (lengths := _lengths(arrays[name])) is None else tensor.split(lengths)
        for name, tensor in tensors.items()
    }
    return [{name: part[m] for name, part in parts.items()} for m in range(count)]


def _lengths(array: np.ndarray | Sequence[np.ndarray]) -> list[int] | None:
    return None if isinstance(array, np.ndarray) else [len(part) for part in array]
