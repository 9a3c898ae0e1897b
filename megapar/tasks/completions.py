"""Completions that the model which trains writes, in its own layout, and what they are rewarded with."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import TrainConfig
from megapar.data.sources.prompts import Prompt
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.files import tokenizer_beside
from megapar.generate.text import completion
from megapar.generate.tokens import Generator, Text, refuse_broken
from megapar.parallel.agreement import all_or_none, gather_texts
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Stage
from megapar.tasks.reward import Reward, find_reward


@dataclass(frozen=True)
class Judged:
    """What became of a completion. length: tokens that were chosen; cut: it did not end by itself"""

    reward: float
    length: int
    cut: bool


class Writer:
    """Writes completions with a rank's stages, and has one rank of each replica reward them.

    seconds: that the last call of `write` took. Every method is collective over all ranks.
    """

    def __init__(self, config: TrainConfig, context: StageContext, stages: Mapping[int, Stage]) -> None:
        self.config, self.mesh = config, context.mesh
        self.world, self.device = context.mesh["world"], context.mesh.device
        self.seconds = 0.0
        # Ranks that write the same: all but those that have other samples.
        self.rewards_here = context.mesh.first_along("weights", "layers", "tokens", None)
        task, samples = config.task, config.train.global_batch_size // context.mesh.samples.size
        with all_or_none(self.world, self.device):
            self.tokenizer = _tokenizer(config)
            assert config.reward is not None, "check the configuration first"
            self.reward: Reward = find_reward(config.reward)
            self.generator = Generator.of(
                config,
                stages,
                context,
                texts=min(task.write_batch, samples),
                vocab_size=self.tokenizer.vocab_size,
                end_of_text=self.tokenizer.end_of_text,
            )

    def write(self, prompts: Sequence[Prompt], samples: Sequence[SampleConfig], numbers: Sequence[int]) -> "Written":
        """A completion of each of this replica's prompts, and what became of all replicas' by number.

        numbers: of the completions; a number below 0 is not rewarded. Raises UserError, on all ranks alike, where a
        reward fails, and for logits that are not finite.
        """
        start = time.perf_counter()
        pairs = zip(prompts, samples, strict=True)
        texts = [Text(list(prompt.tokens), sample, tempered=sample.temperature > 0) for prompt, sample in pairs]
        for _ in self.generator.write(texts):
            pass
        mine: dict[int, tuple[float, int, bool]] = {}
        with all_or_none(self.world, self.device):
            for text in texts:
                refuse_broken(text)
            for prompt, text, number in zip(prompts, texts, numbers, strict=True) if self.rewards_here else ():
                if number >= 0:
                    reward = self.reward(prompt, completion(self.tokenizer, text))
                    mine[number] = reward, len(text.logprobs), text.ended == "length"
        found = gather_texts(json.dumps(mine), self.world, self.device)
        judged = {int(number): Judged(*facts) for text in found for number, facts in json.loads(text).items()}
        self.seconds = time.perf_counter() - start
        return Written(texts, judged)

    def sequence(self, text: Text) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, which of them were chosen) of a text, int64 and bool [n]; the end of text too, if it was."""
        end = [self.tokenizer.end_of_text] if text.ended == "stop" else []
        tokens = np.array([*text.tokens, *end], dtype=np.int64)
        return tokens, np.arange(len(tokens)) >= text.prompt


@dataclass(frozen=True)
class Written:
    """texts: this replica's, in order; judged: those of all replicas, by number"""

    texts: list[Text]
    judged: dict[int, Judged]


def _tokenizer(config: TrainConfig) -> Tokenizer:
    """Raises UserError where there is none, or none that fits."""
    path = tokenizer_beside(config.data.prefix)
    if path is None:
        raise UserError(
            f"{config.data.prefix}: no tokenizer beside the prepared prompts; remove them, to make them anew"
        )
    tokenizer, rows = open_tokenizer(path), config.model.vocab_size
    if rows is not None and tokenizer.vocab_size > rows:
        problem = (
            f"the tokenizer of the data has {tokenizer.vocab_size} tokens; raise it, or give another data.tokenizer"
        )
        raise ConfigError("model.vocab_size", rows, problem)
    return tokenizer
