"""A signal, or its time is over: the run stops after this step, with a checkpoint; see `megapar/stop.py`."""

from megapar.stop import stop_request
from megapar.train.hooks.hook import Hook
from megapar.train.trainer import Step


class Interrupt(Hook):
    """Last behind a step. Rank 0 hears a request from the first step until the last one is done."""

    order = 90

    def start(self) -> None:
        if self.loop.writer is not None:
            stop_request().listen(True)

    def after(self, step: int, done: Step) -> None:
        loop, last = self.loop, step == self.loop.config.train.steps
        if last and loop.writer is not None:
            stop_request().finish()
        if last or not loop.stopping:
            return
        loop.settle()
        saved = loop.save(step)
        if loop.writer is not None:
            loop.writer.say(f"step {step:>6}  interrupted; {saved} has its state")
            loop.writer.close()
        stop_request().answer()


HOOK = Interrupt
