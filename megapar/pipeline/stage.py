"""What the executor asks of a stage."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that passes between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Stage(Protocol):
    """A torch module that is one stage of a model.

    stage(received, batch): from what the stage before sent, empty for the first, and a micro-batch, to the tensors for
        the next stage by name; the last stage's outputs go to the loss
    received(batch), sent(batch): shape and dtype of what it receives and sends. They may differ from one micro-batch to
        the next.
    """

    def __call__(self, received: Tensors, batch: Batch) -> Tensors: ...
    def received(self, batch: Batch) -> Mapping[str, TensorSpec]: ...
    def sent(self, batch: Batch) -> Mapping[str, TensorSpec]: ...
    def train(self, mode: bool = True) -> Any: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
