"""An error that an earlier state mends."""

from megapar.config.errors import UserError


class RollBack(UserError):
    """The run can't go on from this state, but from an earlier one: with `run.max_restarts` it goes on from its newest
    checkpoint. kind: by which a launcher knows it."""

    kind = "rollback"
