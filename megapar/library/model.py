"""A model as a torch module: in one process the whole of it, under torchrun this rank's part."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapar.config.errors import UserError
from megapar.config.keys import check_values
from megapar.config.parse import parse
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import ModelConfig, TrainConfig
from megapar.data.media.samples import MediaSample
from megapar.generate.tokens import Generator, refuse_broken
from megapar.library.batch import check_ids, deal, media_inputs, side_inputs, source_inputs, whole
from megapar.library.gradients import VisibleGrads
from megapar.library.logits import LossFn, cross_entropy, gather_logits, own_loss
from megapar.library.ranks import join, refuse_part
from megapar.library.settings import default_microbatches, proven_schedule, settings
from megapar.models.embedding import Embedding
from megapar.models.head import Head, HiddenStates
from megapar.models.relative import RelativeBias
from megapar.models.stage import EncoderStack
from megapar.models.tokens import Memory, Tokens
from megapar.parallel.collectives import all_reduce
from megapar.parallel.grad_sync import GradSync
from megapar.part import ModelPart
from megapar.pipeline.executor import Executor
from megapar.pipeline.stage import Batch, Tensors
from megapar.schedule.lower import forward_only, lower

MOST_TEXTS = 64  # that are written at a time


def build(
    model: str | Path | ModelConfig,
    *,
    layout: str = "single",
    dtype: str = "fp32",
    device: str | None = None,
    seq_length: int | None = None,
    seed: int | None = None,
    schedule: str = "1f1b",
    chunks: int | None = None,
    **overrides: Any,
) -> "Model":
    """A model with its initial values: `megapar.build("llama_small", layers=4)`.

    model: a name of conf/model/, the path of such a YAML file, or a `megapar.ModelConfig`
    overrides: by the names of the keys `model.*`: layers, hidden, heads, kv_heads, ffn, vocab_size, ...
        vocab_size is 1024 where neither they nor the file say it.
    layout: `single` is the whole model in this process, whatever else runs; `tp2dp2` and the like this rank's part, and
        collective: see `Model`
    dtype: fp64, fp32 or bf16 (with fp32 gradients; `megapar.AdamW` keeps fp32 weights beside)
    device: cpu or cuda; default: cuda where a GPU is visible
    seq_length: rows of a learned position table, and so the most tokens of a sample; default 128. Rotary positions
        have no such bound.
    seed: of initial values and dropout; default 1234. They are the same in every layout.
    schedule, chunks: the pipeline schedule of a layout with pp, and its stages per rank

    Raises ConfigError, one line, for what can't be built.
    """
    choices: dict[str, Any] = {"layout": layout, "dtype": dtype, "device": device, "seq_length": seq_length}
    return Model(settings(model, overrides, **choices, seed=seed, schedule=schedule, chunks=chunks))


class Model(nn.Module):
    """A Transformer made by `build`; B samples, S tokens each, H hidden, V vocabulary.

    In one process it is a module like any other: `model(ids)` gives logits, `loss.backward()` gives `.grad`, and any of
    torch's optimizers trains it (bf16: `megapar.AdamW`). Names of parameters are the same in every layout; q, k and v
    (gate and up) are one parameter, and `weights()` has them one by one.

    In a layout of several ranks it is this rank's part. `forward_backward` is then the one way to gradients, and every
    method but those of nn.Module is collective: all ranks call it alike, with the same arguments.
    """

    def __init__(self, config: TrainConfig, *, initial: bool = True) -> None:
        """initial: with initial values; else zeros, which somebody fills at once."""
        super().__init__()
        self.config = config
        self.rank, self._started = join(config)
        self.world = config.parallel.layout.world
        self.gradients = VisibleGrads(alone=self.world == 1)
        self.part = ModelPart(config, self.rank, weight_grads=self.gradients, initial=initial)
        self.sync = GradSync(self.part.buffers)
        self.executor = Executor(self.part.stages, self.part.mesh, self.gradients, reduce=self.sync.finish)
        stages: list[Any] = list(self.part.stages.values())
        self.embedding: Embedding | None = _first(stages, "embedding")
        self.relative: RelativeBias | None = _first(stages, "relative")
        self.layers = nn.ModuleDict({index: layer for s in stages for index, layer in s.layers.items()})
        self.head: Head | HiddenStates | None = _first(stages, "head")
        self.encoder: EncoderStack | None = _encoder_of(stages)
        self.media = nn.ModuleDict({name: stack for s in stages for name, stack in s.media.items()})
        self.read_bytes = 0  # of the files that the weights are from
        self._calls = 0

    def forward(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        hidden: bool = False,
    ) -> Any:
        """ids int64 [B, S] of any B and S -> logits [B, S, V] in the model's dtype.

        With model.output=hidden: hidden states [B, S, H], with a pooler (hidden states, pooled [B, H]); with
        output=classes: scores [B, classes], of texts whose padding, if any, is behind them.

        attention_mask: [B, S], 1 for tokens and 0 for padding on either side of them, which tokens don't see. What
            padding gives means nothing. token_types: int64 [B, S] of models that have them; default: all 0
        source: int64 [B, L], what the encoder of an encoder-decoder reads, which then begins its ids with
            model.encoder.start; source_mask: its attention_mask
        hidden: (logits, {"embedding": x, "layers.0": x, ...}) with x [B, S, H], the residual stream behind each part.
        With tp the logits are gathered: the whole vocabulary on every rank. Not for layouts with pp. Raises ValueError
        for ids that the model can't read.
        """
        if self.embedding is None or self.head is None:
            raise UserError("model(ids): this rank has not all layers; use model.forward_backward, or model.evaluate")
        self._check(ids, source)
        self.part.mesh.timeline.forget()
        batch = whole(ids, self._count() if self.training else 0) | side_inputs(ids, attention_mask, token_types)
        batch |= source_inputs(ids, source, source_mask, attention_mask)
        return self._through(batch, hidden)

    def read(self, samples: Sequence[MediaSample], *, hidden: bool = False) -> Any:
        """What `forward` gives of samples of images, sound and text, B of them, for a model that has encoders of media.

        S is the longest in tokens, those of images and sounds counted; shorter ones have padding behind them, and what
        that gives means nothing. `megapar.data.media.batches.lay_out` says which token is what. Pixels and waveforms
        are numpy arrays; weights have gradients as of `forward`. Raises ValueError for a sample of a medium that the
        model has no encoder for, and for an image that its patches don't divide.
        """
        if self.embedding is None or self.head is None:
            raise UserError("model.read: this rank has not all parts; use a layout without pp")
        self.part.mesh.timeline.forget()
        batch = media_inputs(self.config, samples, self.device, self.part.context)
        return self._through(batch | {"step": torch.tensor(self._count() if self.training else 0)}, hidden)

    def _through(self, batch: Batch, hidden: bool) -> Any:
        """All parts in turn, see `forward`."""
        assert self.embedding is not None and self.head is not None
        context, shape = self.part.context, batch["ids"].shape
        tokens, memory = Tokens.of(batch, context), None
        if self.encoder is not None:
            read = Tokens.of_source(batch, context)
            memory = Memory(self.encoder.read(None, batch["source"], read), read)
        streams: Tensors = {}
        for stack in self.media.values():
            stack.read(streams, batch)  # type: ignore[operator]
        media = {name.removesuffix("_tokens"): x_tH for name, x_tH in streams.items()}
        x_tH = self.embedding(batch["ids"], tokens, media) if media else self.embedding(batch["ids"], tokens)
        behind = {"embedding": x_tH}
        more: dict[str, Any] = {} if self.relative is None else {"bias": self.relative.of(tokens)}
        more |= {} if memory is None else {"memory": memory}
        for index, layer in self.layers.items():
            x_tH = behind[f"layers.{index}"] = layer(x_tH, tokens, **more)
        if isinstance(self.head, HiddenStates):
            outputs = self.head(x_tH, tokens)
            logits: Any = outputs.get("scores")
            if logits is None:
                last = outputs["hidden"].view(*shape, -1)
                logits = (last, outputs["pooled"]) if "pooled" in outputs else last
        else:
            logits = self._gathered(self.head(x_tH)).view(*shape, -1)
        return (logits, {name: x.view(*shape, -1) for name, x in behind.items()}) if hidden else logits

    def forward_backward(
        self,
        ids: Tensor,
        labels: Tensor,
        *,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        microbatches: int | None = None,
        loss_fn: LossFn | None = None,
    ) -> Tensor:
        """The loss of a global batch, fp64 scalar without a graph, the same on every rank, and its gradients.

        ids, labels: int64 [B, S], the whole batch on every rank; each takes its share. labels are what the model should
            say at each place (the next token); -100 does not count
        source, source_mask: as of `forward`
        microbatches: passes on each data-parallel rank, one after another, or through the pipeline by its schedule;
            B is a multiple of microbatches * dp. Default: 1, with pp two for every pipeline rank
        loss_fn: (logits [b, S, V], labels [b, S]) of a micro-batch -> its mean loss, in place of cross entropy over all
            labels that count; the batch's loss is the mean of these

        Gradients are those of the whole batch, added up over all ranks when this returns. They take the place of
        earlier ones: to accumulate, raise microbatches. Raises ValueError for a batch that does not divide,
        ConfigError where the schedule can't have so many micro-batches.
        """
        self.gradients.refuse_hidden(self.part.context.dtype)
        batches, number = self._dealt(ids, labels, microbatches, self._count(), source, source_mask)
        schedule = proven_schedule(self.config, number)
        with self.gradients.whole_step():
            self.sync.start(schedule)
            losses = self.executor.run(schedule, batches, self._loss(loss_fn, number))
        self.part.context.overlaps.check_peers()
        self.gradients.show(self.part.context.parameters)
        return self._total(losses)

    def evaluate(
        self,
        ids: Tensor,
        labels: Tensor,
        *,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        microbatches: int | None = None,
        loss_fn: LossFn | None = None,
    ) -> Tensor:
        """The loss of `forward_backward` without its gradients, and without dropout."""
        batches, number = self._dealt(ids, labels, microbatches, 0, source, source_mask)
        placement = self.part.schedule.placement
        schedule = lower(forward_only(placement, number), len(placement), number)
        return self._total(self.executor.run(schedule, batches, self._loss(loss_fn, number)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        end_of_text: int | None = None,
    ) -> list[list[int]]:
        """The tokens that are written behind every prompt, at most `max_tokens`, without the end of text.

        prompts: token ids, at least one each; with an encoder, what it reads, to which `end_of_text` is added
        temperature: 0 takes the likeliest token; top_k: of the k likeliest, 0 of all; top_p: of the fewest that have
            this much probability. What is drawn is a function of the seed and a token's place

        Keys and values are kept from token to token. Raises ConfigError for values that can't be, ValueError for ids
        that the model can't read, and UserError for a model without logits, or whose logits are not finite.
        """
        if not self.config.model.has_logits:
            raise UserError(f"model.generate: model.output={self.config.model.output} writes no tokens; use output=lm")
        vocabulary = self.config.model.vocab_size or 0
        for number, prompt in enumerate(prompts):
            if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < vocabulary:
                problem = f"prompt {number} is empty, or has an id that is none of 0 to {vocabulary - 1}"
                raise ValueError(f"model.generate: {problem}")
        values = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        check_values(sample := parse(SampleConfig, values))
        facts = {"texts": max(1, min(len(prompts), MOST_TEXTS)), "end_of_text": end_of_text}
        writer = Generator.of(self.config, self.part.stages, self.part.context, **facts)
        texts = [writer.text(list(prompt), sample) for prompt in prompts]
        for text in writer.write(texts):
            refuse_broken(text)
        return [text.written for text in texts]

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of every logical parameter by name (`layers.0.attention.q.weight`), as views to write into.

        After writing with an optimizer of ours around, call its `refresh()`.
        """
        return {held.piece.record.name: held.view(self.part.buffers.params) for held in self.part.buffers.held()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; in bf16, where gradients are not `.grad`, always as if to None."""
        super().zero_grad(set_to_none)
        self.gradients.clear()

    @property
    def device(self) -> torch.device:
        return self.part.context.device

    def close(self) -> None:
        """Leave the ranks' groups, and end torch's default group if `build` started it. Then the model is of no use."""
        if self.world > 1:
            dist.barrier()
        self.part.close()
        if self._started:
            dist.destroy_process_group()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's, into the parameters that there are. Raises UserError for assign=True."""
        if assign:
            raise UserError("load_state_dict: parameters are views of flat buffers; leave out assign=True")
        return super().load_state_dict(state_dict, strict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Model":
        refuse_part(self.world, "deepcopy")
        own = self.part.context.parameters
        if {id(local.tensor) for local in own} != {id(parameter) for parameter in self.parameters()}:
            raise UserError("deepcopy: modules of this model have been replaced; build another one, and replace them")
        twin = memo[id(self)] = type(self)(self.config)
        for local, other in zip(own, twin.part.context.parameters, strict=True):
            with torch.no_grad():
                other.tensor.copy_(local.tensor)
            other.tensor.requires_grad_(local.tensor.requires_grad)
            if self.gradients.has(local):
                self.gradients.settle(local)
                other.grad.copy_(local.grad)
                twin.gradients.show([other])
        twin._calls = self._calls
        return twin.train(self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError("a model can't be pickled; save model.state_dict(), and load it into one that is built alike")

    def _apply(self, fn: Any, recurse: bool = True) -> "Model":
        """What .to(), .cuda(), .half() and the like come to: refused where it would change anything."""
        probe = torch.empty(0, dtype=self.part.context.dtype, device=self.device)
        made = fn(probe)
        if made.dtype != probe.dtype or made.device != probe.device:
            problem = f"the parameters are {probe.dtype} on {probe.device}, in flat buffers that stay"
            raise UserError(f"{problem}; build the model anew with dtype=..., device=...")
        return self

    def _count(self) -> int:
        """The number of this pass, which dropout goes by."""
        self._calls += 1
        return self._calls

    def _gathered(self, logits: Tensor) -> Tensor:
        return gather_logits(logits, self.config.model.vocab_size or 0, self.part.mesh["tp"])

    def _check(self, ids: Tensor, source: Tensor | None) -> None:
        check_ids(ids, self.config, self.device)
        reads = self.config.model.encoder.layers > 0
        if reads != (source is not None):
            needed = "has an encoder; give what it reads" if reads else "has no encoder; leave it out"
            raise ValueError(f"source: the model {needed}")
        if source is not None:
            check_ids(source, self.config, self.device, "source")

    def _dealt(
        self,
        ids: Tensor,
        labels: Tensor,
        microbatches: int | None,
        step: int,
        source: Tensor | None,
        source_mask: Tensor | None,
    ) -> tuple[list[Any], int]:
        self._check(ids, source)
        check_ids(labels, self.config, self.device, "labels")
        number = default_microbatches(self.config) if microbatches is None else microbatches
        self.part.mesh.timeline.forget()
        return deal(ids, labels, step, self.part.mesh.samples, number, source, source_mask), number

    def _loss(self, loss_fn: LossFn | None, microbatches: int) -> Any:
        tp = self.part.mesh["tp"]
        if loss_fn is None:
            return cross_entropy(getattr(self.head, "first_id", 0), tp)
        parts = microbatches * self.part.mesh.samples.size
        return own_loss(loss_fn, parts, self.config.model.vocab_size or 0, tp)

    def _total(self, losses: list[Tensor]) -> Tensor:
        """Of losses that tensor-parallel peers share one counts; the sum is known on every rank."""
        self.train(self.training)  # the executor has set the stages' mode
        mesh = self.part.mesh
        counted = losses if mesh.first_along("weights", None) else []
        total = sum((loss.double() for loss in counted), torch.zeros((), dtype=torch.float64, device=self.device))
        return all_reduce(total, mesh["world"])


def _first(stages: list[Any], name: str) -> Any:
    return next((found for stage in stages if (found := getattr(stage, name)) is not None), None)


def _encoder_of(stages: list[Any]) -> EncoderStack | None:
    """What these stages have of an encoder, together."""
    stacks = [stage.encoder for stage in stages if stage.encoder is not None]
    if len(stacks) < 2:
        return stacks[0] if stacks else None
    whole = EncoderStack(stacks[0].context)
    whole.embedding, whole.relative, whole.norm = (_first(stacks, name) for name in ("embedding", "relative", "norm"))
    for stack in stacks:
        whole.layers.update(stack.layers)
    return whole
