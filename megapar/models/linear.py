"""Linear layers from the tensor-parallel policy, with the adapters that the model names."""

from megapar.config.policy import Linear
from megapar.config.schema import ModelConfig
from megapar.parallel.context import StageContext
from megapar.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megapar.parallel.lora import ColumnAdapter, RowAdapter
from megapar.parallel.record import Normal


def column(
    context: StageContext, model: ModelConfig, linear: Linear, prefix: str, tie: str | None = None
) -> ColumnParallelLinear:
    """The layer of a product that is cut by columns; prefix: of its weights' names."""
    assert linear.split == "column"
    outputs = [(prefix + output.name, output.features, output.blocks) for output in linear.outputs]
    init = Normal(model.init_std)
    layer = ColumnParallelLinear(context, linear.inputs, outputs, init=init, bias=linear.bias, tie=tie)
    if any(model.lora.adapts(output.name) for output in linear.outputs):
        layer.adapter = ColumnAdapter(context, model.lora, linear.inputs, outputs)
    return layer


def row(context: StageContext, model: ModelConfig, linear: Linear, prefix: str) -> RowParallelLinear:
    """The layer of a product that is cut by rows; prefix: of its weight's name."""
    assert linear.split == "row"
    [output] = linear.outputs
    # Projections into the residual stream start smaller, so that its variance does not grow with depth (GPT-2).
    init = Normal(model.init_std / (2 * model.layers) ** 0.5 if linear.residual else model.init_std)
    name, sizes = prefix + output.name, (linear.inputs, output.features)
    layer = RowParallelLinear(context, name, *sizes, init=init, bias=linear.bias, blocks=linear.blocks)
    if model.lora.adapts(output.name):
        layer.adapter = RowAdapter(context, model.lora, name, *sizes, linear.blocks)
    return layer
