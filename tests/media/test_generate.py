"""Text written behind images and sound, and evaluations by modality, are those of a model that computes all anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapar.config.errors import UserError
from megapar.config.run_schema import GenerateConfig, SampleConfig
from megapar.config.schema import TrainConfig
from megapar.data.media.batches import Rows, lay_out
from megapar.data.media.samples import AUDIO, IMAGE, MediaSample
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import MODEL
from megapar.data.tokenizer.train import BYTES, make_tokenizer
from megapar.evaluate.scorer import Scorer
from megapar.generate.choose import choose
from megapar.generate.prompts import prompts_of
from megapar.generate.tokens import Generator
from megapar.launch.pool import WorkerPool
from megapar.part import ModelPart
from megapar.train.trainer import Trainer
from tests.media.samples import CLASSIFIES, WRITES
from tests.tiny import tiny_config

WIDE: dict[str, Any] = {"model.init_std": 0.5, "train.dtype": "fp64"}
END = 2


def prompt(number: int, marks: list[int], sizes: list[tuple[int, int]], sounds: list[int]) -> MediaSample:
    random = np.random.default_rng(number)
    images = tuple(random.integers(0, 256, (*size, 1), dtype=np.uint8) for size in sizes)
    clips = tuple(random.standard_normal(samples).astype(np.float32) / 4 for samples in sounds)
    return MediaSample(images, clips, np.array(marks), np.zeros(0, dtype=np.int64), number % 3)


PROMPTS = [
    prompt(0, [5, IMAGE, 60, AUDIO, 17], [(2, 4)], [40]),
    prompt(1, [IMAGE, IMAGE], [(2, 2), (4, 4)], []),
    prompt(2, [9, 8, 7], [], []),
    prompt(3, [AUDIO, 30, AUDIO], [], [25, 50]),
    prompt(4, [IMAGE, 44], [(6, 4)], []),
]
SAMPLES = [
    SampleConfig(max_tokens=9, temperature=0.0),
    SampleConfig(max_tokens=40, temperature=1.0, seed=1),  # more than the context holds
    SampleConfig(max_tokens=6, temperature=1.5, top_k=20, seed=2),
    SampleConfig(max_tokens=1, temperature=0.0),
    SampleConfig(max_tokens=7, temperature=0.7, seed=3),
]


def written(rank: int, world_size: int, config: TrainConfig) -> list[tuple[list[int], list[float]]]:
    """Three at a time, so that texts join and leave."""
    trainer = Trainer(config, rank)
    made = Generator.of(config, trainer.stages, trainer.context, end_of_text=END, texts=3)
    texts = [made.text(one, sample) for one, sample in zip(PROMPTS, SAMPLES, strict=True)]
    assert {id(text) for text in made.write(texts)} == {id(text) for text in texts}
    trainer.close()
    return [(text.written, text.logprobs) for text in texts]


def anew(rank: int, world_size: int, config: TrainConfig) -> list[tuple[list[int], list[float]]]:
    """All of a prompt and of what is written, for every token."""
    trainer, found = Trainer(config, rank), []
    [stage] = trainer.stages.values()
    stage.train(False)
    for one, sample in zip(PROMPTS, SAMPLES, strict=True):
        tokens: list[int] = []
        logprobs: list[float] = []
        room = config.train.seq_length - len(lay_out(config.model, one, one.text)) + 1
        while len(logprobs) < min(sample.max_tokens, room):
            laid, rows = (
                lay_out(config.model, one, np.array([*one.text, *tokens])),
                Rows(config.model, ("image", "audio")),
            )
            arrays = {"ids": laid.ids[None], "kinds": laid.kinds[None], "media": rows.add(0, laid)[None]}
            batch = {name: torch.from_numpy(array) for name, array in (arrays | rows.arrays()).items()}
            with torch.no_grad():
                [*_, logits] = stage({}, batch | {"samples": torch.zeros(1).long(), "step": torch.tensor(0)})["logits"]
            number = len(laid)
            token = int(choose(logits.numpy(), sample, number)) if sample.temperature else int(logits.argmax())
            logprobs.append(float(torch.log_softmax(logits, 0)[token]))
            if token == END:
                break
            tokens.append(token)
        found.append((tokens, logprobs))
    trainer.close()
    return found


def test_the_cache_changes_no_text(pool: WorkerPool, media: dict[str, Any]) -> None:
    """In any layout, whatever is written beside it. Probabilities are sums in other orders: 1e-9."""
    values = media | WRITES | WIDE
    [expected] = pool.run(anew, 1, tiny_config(media["data.prefix"], **values))
    assert sum(len(set(text)) > 2 for text, _ in expected) > 1
    more: dict[str, Any] = {"parallel.sequence_parallel": True}
    for layout, own in (("single", {}), ("tp2", {}), ("pp2", {}), ("pp4", {}), ("tp2pp2", more)):
        config = tiny_config(media["data.prefix"], layout, **values | own)
        for found in pool.run(written, config.parallel.layout.world, config):
            assert [text for text, _ in found] == [text for text, _ in expected], layout
            for (_, mine), (_, theirs) in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)


def test_a_prompt_that_does_not_fit(media: dict[str, Any]) -> None:
    trainer = Trainer(tiny_config(media["data.prefix"], **media | WRITES), 0)
    made = Generator.of(trainer.config, trainer.stages, trainer.context)
    with pytest.raises(UserError, match=r"40 tokens with those of images and sounds, and the model's context holds"):
        made.text(prompt(0, [IMAGE], [(20, 8)], []), SampleConfig())
    trainer.close()


def test_marks_in_a_file_of_prompts_are_refused(media: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("alpha\nwhat is <audio>?\n", encoding="utf-8")
    make_tokenizer(BYTES, [], 0, tmp_path / MODEL)
    trained = tiny_config(media["data.prefix"], **media | WRITES)
    config = GenerateConfig(prompt="", prompt_file=str(tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match=r"prompts.txt:2: <audio> is for one prompt; give it as prompt="):
        prompts_of(config, open_tokenizer(tmp_path / MODEL), trained)


def scores(rank: int, world_size: int, config: TrainConfig, batch_size: int) -> np.ndarray:
    part = ModelPart(config, rank, weights_only=True)
    found = Scorer(part, batch_size).scores_of_media(PROMPTS)
    part.close()
    return found


def test_scores_are_those_of_each_sample_alone(pool: WorkerPool, media: dict[str, Any]) -> None:
    values = media | CLASSIFIES | WIDE
    [expected] = pool.run(scores, 1, tiny_config(media["data.prefix"], **values), 1)
    assert np.ptp(expected, 0).min() > 1e-3
    more: dict[str, Any] = {"parallel.sequence_parallel": True}
    for layout, own in (("tp2", more), ("pp3", {}), ("dp2", {})):
        config = tiny_config(media["data.prefix"], layout, **values | own)
        for found in pool.run(scores, config.parallel.layout.world, config, 3):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
