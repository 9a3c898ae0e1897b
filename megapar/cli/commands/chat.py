"""`megapar chat`: talk to the model of a run."""

from megapar.cli import forward
from megapar.cli.command import Call, Command
from megapar.config.run_schema import ChatConfig

ENTRY = "megapar.generate.chat:run_rank"


def run(config: ChatConfig, call: Call) -> int:
    """Talk, on ranks of this machine. Returns the exit code."""
    config, trained, _ = forward.resolve_writer(config)
    from megapar.launch.local import launch

    launch(forward.job(config, trained, call, ENTRY, "chat", typed=True, stopping="\n"))
    return 0


COMMAND = Command(
    name="chat",
    config=ChatConfig,
    run=run,
    order=3,
    positional="run.dir",
    about="talk to a trained model",
    examples=[
        (
            "megapar chat runs/demo",
            "a message a line, to /exit or Ctrl-D; Ctrl-C stops an answer, and between answers the command",
        ),
        ("megapar chat runs/demo parallel=tp2 sample.max_tokens=500", "on two ranks, with longer answers"),
    ],
    most_used=[
        *("run.dir", "sample.max_tokens", "sample.temperature", "sample.top_k", "sample.top_p", "sample.seed"),
        *("parallel.tp", "checkpoint.load"),
    ],
)
