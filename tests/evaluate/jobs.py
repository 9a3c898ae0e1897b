"""What the pool's ranks do in the tests of evaluation."""

from megapar.config.errors import UserError
from megapar.console import set_console
from megapar.evaluate.config import EvalConfig
from megapar.evaluate.run import run_rank


def evaluate(rank: int, world_size: int, config: EvalConfig) -> str | None:
    """The command's rank, silent; the line if it refuses."""
    set_console(None)
    try:
        run_rank(config, rank, world_size)
    except UserError as error:
        return str(error)
    return None
