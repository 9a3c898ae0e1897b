"""`run.preflight`: are all ranks fit, before the first step."""

from megapar.config.schema import TrainConfig
from megapar.train.hooks.hook import Hook
from megapar.train.preflight import preflight


class Preflight(Hook):
    order = 5

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.run.preflight

    def start(self) -> None:
        line = preflight(self.loop.trainer, self.loop.folder)
        if self.loop.writer is not None:
            self.loop.writer.say(line)


HOOK = Preflight
