"""`megapar serve`: answer requests over HTTP with the model of a run."""

import socket

from megapar.cli import forward
from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.run_schema import ServeConfig

ENTRY = "megapar.generate.serve:run_rank"


def run(config: ServeConfig, call: Call) -> int:
    """Serve, on ranks of this machine, until Ctrl-C."""
    config, trained, _ = forward.resolve_writer(config)
    _refuse_taken(config.port)
    from megapar.launch.local import launch

    launch(forward.job(config, trained, call, ENTRY, "serve"))
    return 0


def _refuse_taken(port: int) -> None:
    """Raise ConfigError where the ranks could not have the port: they would say so only when the model is loaded."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError("port", port, f"can't be had ({error.strerror}); name another one") from None


COMMAND = Command(
    name="serve",
    config=ServeConfig,
    run=run,
    order=3,
    positional="run.dir",
    about="answer OpenAI-style HTTP requests with a trained model",
    examples=[
        ("megapar serve runs/demo", "POST /v1/completions, GET /v1/models and /health on 127.0.0.1:8000"),
        ("megapar serve runs/demo port=9000 parallel=tp2 serve.max_batch=32", "on two ranks, 32 texts at a time"),
    ],
    most_used=[
        *("run.dir", "port", "serve.max_batch", "serve.max_queue", "serve.max_tokens"),
        *("sample.max_tokens", "sample.temperature", "parallel.tp", "checkpoint.load"),
    ],
)
