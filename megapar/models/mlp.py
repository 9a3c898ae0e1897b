"""The MLP of a layer."""

from collections.abc import Callable

from torch import Tensor, nn, relu

from megapar.config.policy import layer_linears
from megapar.config.schema import ModelConfig
from megapar.kernels.swiglu import geglu, gelu, gelu_erf, swiglu
from megapar.models.linear import column, row
from megapar.parallel.context import StageContext

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "gelu": gelu,
    "gelu_erf": gelu_erf,
    "relu": relu,
}


class MLP(nn.Module):
    """x [t, H] -> [t, H] through an inner width F: SwiGLU or GEGLU with a gate, GELU in either form, or ReLU."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str) -> None:
        super().__init__()
        linears = layer_linears(model)
        self.activation = ACTIVATIONS[model.activation]
        self.up = column(context, model, linears["mlp.up"], f"{name}.")
        self.down = row(context, model, linears["mlp.down"], f"{name}.")

    def forward(self, x_tH: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_tH)))  # with a gate its columns come first, then up's
