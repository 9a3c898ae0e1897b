"""Partitions of layers over stages: pure arithmetic."""

from megapar.pipeline.partition import partition


def test_partitions_cover_the_layers_once() -> None:
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            parts = partition(layers, stages, "uniform")
            assert [layer for part in parts for layer in part] == list(range(layers))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(parts[-1]) == min(map(len, parts))
    assert [len(part) for part in partition(8, 2, [5, 3])] == [5, 3]
