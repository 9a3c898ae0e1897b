"""A step's micro-batches on their way to the device: once per step and not once per tensor and micro-batch."""

from collections.abc import Mapping

import numpy as np
import torch

from megapar.pipeline.stage import Batch


def send(arrays: Mapping[str, np.ndarray], device: torch.device) -> list[Batch]:
    """Arrays [M, ...] -> M batches on the device, of views: batch m has every array's part m.

    To a GPU each array is one transfer from pinned memory, which the host does not wait for.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    [count] = {len(array) for array in arrays.values()}
    return [{name: tensor[m] for name, tensor in tensors.items()} for m in range(count)]
