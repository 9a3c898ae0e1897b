"""`megapar verify`: compare layouts with one process."""

from contextlib import ExitStack

from megapar.cli.command import Call, Command
from megapar.config.schema import VerifyConfig


def run(config: VerifyConfig, call: Call) -> int:
    """Compare layouts. Returns the exit code."""
    from megapar.cli.finish import finish
    from megapar.kernels import select_backends
    from megapar.launch import rundir

    config = finish(config)
    with ExitStack() as claims:
        backends = select_backends(config.kernels.backend, config.train.device, config.train.dtype)
        config = rundir.create(config, call.overrides, backends, claims)
        import megapar.verify

        return megapar.verify.run(config)


COMMAND = Command(
    name="verify",
    config=VerifyConfig,
    run=run,
    order=2,
    # An experiment's number of steps, and its batch, are for a model that is to learn; a comparison needs a few. The
    # last three count in steps or divide the batch, and what they say of many is refused of a few.
    own=[
        *("train.steps", "train.global_batch_size", "train.micro_batch_size"),
        *("optim.warmup_steps", "train.trace", "task.group"),
    ],
    about="train a few steps in many layouts and compare every gradient with one process",
    examples=[
        ("megapar verify", "every feasible layout of up to 8 ranks, in fp64"),
        ("megapar verify layouts=[tp2pp2dp2,tp4]", "two layouts"),
        ("megapar verify model=gpt2_tiny train.dtype=fp32", "another model, in single precision"),
        ("megapar verify experiment=demo layouts=[tp2]", "an experiment's, with the steps and the batch of verify"),
    ],
    most_used=[
        *("layouts", "train.dtype", "train.steps", "parallel.sequence_parallel", "parallel.zero", "run.dir", "out"),
    ],
)
