"""Being called at sites while a rank's stages run. Without hooks a module's call is torch's fast path, so what nobody
looks at costs nothing."""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megapar.config.errors import UserError
from megapar.config.stacks import TRUNK
from megapar.interpret.local import Local, View, attention_weights, view_of
from megapar.interpret.sites import WEIGHTS, Site, sites_of
from megapar.models.layer import TransformerLayer
from megapar.models.stage import Stack, TransformerStage
from megapar.models.tokens import Tokens
from megapar.part import ModelPart

class Walk:
    """A context that is called at every pass through a site of this rank. Enter it on all ranks alike.

    Raises UserError where the model has no such sites, or runs from CUDA graphs.
    """

    def __init__(self, model: Any, names: Sequence[str], key: str) -> None:
        self.part: ModelPart = getattr(model, "part", model)
        if getattr(self.part, "graphs", None) is not None:
            raise UserError(f"{key}: steps run from CUDA graphs, in which nothing is seen; use train.cuda_graphs=off")
        if any(not isinstance(stage, TransformerStage) for stage in self.part.stages.values()):
            raise UserError(f"{key}: sites are those of our Transformer; use torch's hooks in a model of your own")
        self.sites = sites_of(names, self.part.config.model, key)
        self._handles: list[RemovableHandle] = []
        self._tokens: dict[str, Tokens] = {}

    def passes(self, site: Site, view: View, tensor: Tensor) -> Tensor | None:
        """What comes by. What is returned, unless None, takes the tensor's place."""
        raise NotImplementedError

    def attends(self, site: Site, weights: Tensor, local: Local) -> None:
        """[t, n, S] of attention, computed beside the pass."""
        raise NotImplementedError

    def __enter__(self) -> "Walk":
        stacks = {site.stack for site in self.sites}
        for stage in self.part.stages.values():
            for name in stacks:
                if (stack := _stack(stage, name)) is not None:
                    self._follow(name, stage, stack)
                    for site in self.sites:
                        if site.stack == name:
                            self._look(site, stack)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._tokens.clear()

    def _follow(self, name: str, stage: Any, stack: Any) -> None:
        """Know which tokens are under way: parts that know it are told by their caller."""
        for module in (*stack.layers.values(), *([stack.embedding] if stack.embedding is not None else [])):
            self._handles.append(module.register_forward_pre_hook(partial(self._came, name)))
        if name == TRUNK and stage.reads_text:  # a stage may be the head alone
            self._handles.append(stage.register_forward_pre_hook(self._came_to_stage))

    def _came(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tokens[name] = args[1]

    def _came_to_stage(self, stage: Any, args: tuple[Any, ...]) -> None:
        self._tokens[TRUNK] = Tokens.of(args[1], self.part.context, *args[2:])

    def _look(self, site: Site, stack: Any) -> None:
        try:
            module = attrgetter(site.module)(_Layers(stack)) if site.layer is not None else attrgetter(site.module)(stack)
        except (AttributeError, KeyError):
            return  # it is another stage's
        if module is None:
            return
        if site.kind == WEIGHTS:
            handle = module.register_forward_hook(partial(self._attends, site))
        elif site.is_input:
            handle = module.register_forward_pre_hook(partial(self._enters, site))
        else:
            handle = module.register_forward_hook(partial(self._leaves, site))
        self._handles.append(handle)

    def _enters(self, site: Site, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = self._visited(site, module, args[0])
        return None if new is None else (new, *args[1:])

    def _leaves(self, site: Site, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._visited(site, module, output)

    def _attends(self, site: Site, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x_tH, tokens, *bias = args
        self.attends(site, *attention_weights(module, x_tH, tokens, bias[0] if bias else None))

    def _visited(self, site: Site, module: nn.Module, tensor: Tensor) -> Tensor | None:
        return self.passes(site, view_of(site, module, self._tokens[site.stack]), tensor)


class _Layers:
    """A stack's layers by the names that sites give them."""

    def __init__(self, stack: Stack) -> None:
        self.layers = _Numbered(stack)


class _Numbered:
    def __init__(self, stack: Stack) -> None:
        self._layers = stack.layers

    def __getattr__(self, index: str) -> TransformerLayer:
        return self._layers[index]  # type: ignore[return-value]


def _stack(stage: Any, name: str) -> Any:
    """What a stage has of a stack, None: nothing."""
    if name == TRUNK:
        return stage if stage.reads_text else None
    if name == "encoder":
        return stage.encoder
    return stage.media[name] if name in stage.media else None


def in_backward() -> bool:
    """Whether a layer is computed once more, for its gradients."""
    return torch._C._current_graph_task_id() != -1
