"""Windows over token files: a text or a folder, tokenised once, or Megatron's .bin/.idx files."""

from collections.abc import Callable

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.prepare import check, prepare
from megapar.data.samples import SampleSet
from megapar.data.source import Prepared, Source, Split


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    found = prepare(config, log=say)
    check(found.prefix, config.verify)
    return Prepared(found.prefix, found.vocab_size, found.max_token, found.tokenizer_path)


def _open(config: TrainConfig, split: Split) -> SampleSet:
    assert config.data.prefix is not None
    train = config.train
    return SampleSet(
        config.data.prefix, split=split, seq_length=train.seq_length, seed=train.seed, holdout=config.data.split
    )


SOURCE = Source("tokens", "windows over token files, made from text where there are none", _prepare, _open)
