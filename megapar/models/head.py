"""The last part: the residual stream to logits, or to hidden states."""

import torch
from torch import Tensor, nn

from megapar.config.policy import head_linear
from megapar.config.schema import ModelConfig
from megapar.kernels.swiglu import gelu
from megapar.models.layer import norm
from megapar.models.linear import column
from megapar.models.mlp import ACTIVATIONS
from megapar.models.tokens import Tokens
from megapar.parallel.collectives import gather_tokens
from megapar.parallel.context import StageContext
from megapar.parallel.layers import ReplicatedLinear
from megapar.parallel.record import Constant, Normal, ParameterRecord, Split
from megapar.parallel.weight_grad import AddBias, LocalParameter, owned_op
from megapar.pipeline.stage import Tensors


class Head(nn.Module):
    """The last norm and the product to logits: x [t, H] -> [T, V]. Tied: it multiplies by the embedding's weight.

    With `model.output=mlm` a dense layer with the MLP's activation, GELU if that has a gate, stands before the norm
    (Devlin et al. 2019). With `norm_order=post` the last layer has ended in a norm already, and there is no other one.
    first_id: the token of this rank's first logit.
    """

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__()
        self.context, self.scale, self.softcap = context, model.logit_scale, model.logit_softcap
        self.dense: ReplicatedLinear | None = None
        if model.output == "mlm":
            init = Normal(model.init_std)
            self.dense = ReplicatedLinear(context, "head.dense", model.hidden, model.hidden, init=init)
            self.activation = gelu if model.gated else ACTIVATIONS[model.activation]
        ends_in_norm = model.norm_order == "post" and model.output == "lm"
        self.norm = None if ends_in_norm else norm(context, model, "norm")
        self.logits = column(context, model, head_linear(model), "", tie="embedding" if model.tied else None)
        self.first_id = self.logits.owner.pieces[0].shard.box[0].start
        self.bias_owner: LocalParameter | None = None
        if model.output_bias:
            assert model.vocab_size is not None
            record = ParameterRecord("head.bias", (model.vocab_size,), Constant(0.0), (Split("tp", 0),))
            self.bias_owner = context.parameter(self, "bias", record)

    def forward(self, x_tH: Tensor) -> Tensor:
        if self.dense is not None:
            x_tH = self.activation(self.dense(x_tH))
        x_tH = x_tH if self.norm is None else self.norm(x_tH)
        logits_TV = self.logits(x_tH if self.scale == 1.0 else x_tH * self.scale)
        if self.bias_owner is not None:
            logits_TV = owned_op(AddBias, logits_TV, self.bias_owner, self.context.weight_grads)
        if self.softcap is not None:  # what comes last keeps nothing, as the cross entropy overwrites it
            logits_TV = torch.tanh(logits_TV / self.softcap) * self.softcap
        return logits_TV


class HiddenStates(nn.Module):
    """x [t, H] -> {"hidden": [T, H]}, the same on every tensor-parallel rank; with `norm_order` post as it is, else
    behind the last norm. With `model.pooler` also {"pooled": [B, H]}: tanh of a dense layer of what stands for a
    text."""

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__()
        self.context = context
        self.norm = None if model.norm_order == "post" else norm(context, model, "norm")
        self.pooling = model.pools
        self.pooler: ReplicatedLinear | None = None
        if model.pooler:
            sizes = (model.hidden, model.hidden)
            init = Normal(model.init_std)
            self.pooler = ReplicatedLinear(context, "pooler", *sizes, init=init, sees="all", adapter=True)

    def forward(self, x_tH: Tensor, tokens: Tokens) -> Tensors:
        x_TH = self.gathered(x_tH)
        return {"hidden": x_TH} if self.pooler is None else {"hidden": x_TH, "pooled": self.pooled(x_TH, tokens)}

    def gathered(self, x_tH: Tensor) -> Tensor:
        """[T, H]: of all tokens, behind the last norm."""
        x_tH = x_tH if self.norm is None else self.norm(x_tH)
        return gather_tokens(x_tH, self.context.tp) if self.context.splits_tokens else x_tH

    def pooled(self, x_TH: Tensor, tokens: Tokens) -> Tensor:
        """[B, H]: what stands for each text, its padding left out."""
        x_BSH = x_TH.view(-1, tokens.length, x_TH.shape[1])
        match self.pooling:
            case "first":
                x_BH = x_BSH[:, 0]
            case "last":
                x_BH = x_BSH[torch.arange(len(x_BSH), device=x_BSH.device), tokens.text_lengths - 1]
            case "mean":
                inside = torch.arange(tokens.length, device=x_BSH.device) < tokens.text_lengths.unsqueeze(1)
                x_BH = x_BSH.masked_fill(~inside.unsqueeze(2), 0.0).sum(1) / tokens.text_lengths.unsqueeze(1)
        return x_BH if self.pooler is None else torch.tanh(self.pooler(x_BH))


class Classifier(HiddenStates):
    """x [t, H] -> {"scores": [B, C]}, of every text and class, the same on every tensor-parallel rank: a linear layer
    of what stands for a text (Devlin et al. 2019, section 4)."""

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__(context, model)
        assert model.classes is not None, "resolve the configuration first"
        sizes = (model.hidden, model.classes)
        init = Normal(model.init_std)
        self.scores = ReplicatedLinear(context, "classifier", *sizes, init=init, sees="all", adapter=True)

    def forward(self, x_tH: Tensor, tokens: Tokens) -> Tensors:
        return {"scores": self.scores(self.pooled(self.gathered(x_tH), tokens))}
