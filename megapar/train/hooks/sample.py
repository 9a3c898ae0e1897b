"""Text that the trained model writes after the last step: `task.sample_tokens` tokens."""

from typing import Any

from megapar.config.errors import UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import tokenizer_beside
from megapar.generate.text import TextStream, prompt_tokens
from megapar.generate.tokens import Generator, generate_tokens
from megapar.train.hooks.hook import Hook


class Sample(Hook):
    order = 60

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.task.sample_tokens > 0

    def finish(self) -> dict[str, Any]:
        """sample: the same text on every rank. None: the model writes nothing, for the reason in sample_problem."""
        try:
            return {"sample": self._text(), "sample_problem": None}
        except UserError as error:  # on all ranks alike; the training is done all the same
            return {"sample": None, "sample_problem": str(error)}

    def _text(self) -> str:
        config, trainer = self.loop.config, self.loop.trainer
        path = tokenizer_beside(config.data.prefix)
        if path is None:
            raise UserError(f"{config.data.prefix}: no tokenizer beside these token files any more; put it back")
        tokenizer = open_tokenizer(path)
        prompt = prompt_tokens(tokenizer, config.task.sample_prompt)
        pieces = [] if config.model.encoder.layers else [config.task.sample_prompt]
        stream = TextStream(tokenizer, pieces.append, prompt)
        generator = Generator.of(
            config,
            trainer.stages,
            trainer.context,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        )
        sample = SampleConfig(max_tokens=config.task.sample_tokens, seed=config.train.seed)
        generate_tokens(generator, prompt, sample, stream.put)
        stream.finish()
        return "".join(pieces)


HOOK = Sample
