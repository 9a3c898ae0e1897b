"""Being called at sites while a rank's stages run. Without hooks a module's call is torch's fast path, so what nobody
looks at costs nothing."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megapar.config.errors import UserError
from megapar.config.sites import WEIGHTS, Site, sites_of
from megapar.config.stacks import TRUNK
from megapar.interpret.local import Local, View, attention_weights, view_of
from megapar.models.stage import TransformerStage
from megapar.models.tokens import Tokens
from megapar.part import ModelPart


class Walk:
    """A context that is called at every pass through a site of this rank. Enter it on all ranks alike.

    written: passes count, too, in which a text is being written, token by token
    Raises UserError where the model has no such sites, or runs from CUDA graphs.
    """

    def __init__(self, model: Any, names: Sequence[str], key: str, *, written: bool = True) -> None:
        self.part = part_of(model, key)
        if getattr(self.part, "graphs", None) is not None:
            raise UserError(f"{key}: steps run from CUDA graphs, in which nothing is seen; use train.cuda_graphs=off")
        if any(not isinstance(stage, TransformerStage) for stage in self.part.stages.values()):
            raise UserError(f"{key}: sites are those of our Transformer; use torch's hooks in a model of your own")
        self.key, self.sites = key, sites_of(names, self.part.config.model, key)
        self._handles: list[RemovableHandle] = []
        self._tokens: dict[str, Tokens] = {}
        self.written = written

    def passes(self, site: Site, view: View, tensor: Tensor) -> Tensor | None:
        """What comes by. What is returned, unless None, takes the tensor's place."""
        raise NotImplementedError

    def attends(self, site: Site, weights: Tensor, local: Local) -> None:
        """[t, n, S] of attention, computed beside the pass."""
        raise NotImplementedError

    def __enter__(self) -> "Walk":
        if self._handles:
            raise UserError(f"{self.key}: is entered already; make a second one")
        stacks = {site.stack for site in self.sites}
        for stage in self.part.stages.values():
            for name in stacks:
                if (stack := _stack(stage, name)) is not None:
                    self._follow(name, stage, stack)
                    for site in self.sites:
                        if site.stack == name:
                            self._look(site, stack)
        return self

    def __exit__(self, *error: object) -> None:
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
        module = _module(site, stack)
        if module is None:
            return  # it is another stage's
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
        if tokens.new is not None and not self.written:
            return
        self.attends(site, *attention_weights(module, x_tH, tokens, bias[0] if bias else None))

    def _visited(self, site: Site, module: nn.Module, tensor: Tensor) -> Tensor | None:
        tokens = self._tokens[site.stack]
        if tokens.new is not None and not self.written:
            return None
        return self.passes(site, view_of(site, module, tokens), tensor)


def part_of(model: Any, key: str) -> ModelPart:
    """The part of a `Model`, or of what has one. Raises UserError for anything else."""
    part = getattr(model, "part", model)
    if not isinstance(part, ModelPart):
        raise UserError(f"{key}: a {type(model).__name__} is no model of megapar.build, nor a ModelPart; give one")
    return part


def _module(site: Site, stack: Any) -> nn.Module | None:
    """At which a site is found; None: this part of its stack has none."""
    found = stack
    if site.layer is not None:
        found = dict(stack.layers.items()).get(str(site.layer))
    for name in filter(None, site.path.split(".")):
        found = getattr(found, name, None)
    return found


def _stack(stage: Any, name: str) -> Any:
    """What a stage has of a stack, None: nothing."""
    if name == TRUNK:
        return stage if stage.reads_text else None
    if name == "encoder":
        return stage.encoder
    return dict(stage.media.items()).get(name)


def in_backward() -> bool:
    """Whether a layer is computed once more, for its gradients."""
    return torch._C._current_graph_task_id() != -1
