"""A bucket owns its memory."""

import torch

from megapar.train.trainer import Trainer
from tests.tiny import tiny_config


def test_a_bucket_gives_its_memory_back_and_takes_it_again(tokens: str) -> None:
    """Between forward and backward: what autograd has saved is good again, and no other bucket is touched."""
    trainer = Trainer(tiny_config(tokens), 0)
    buckets = trainer.buffers.buckets
    assert len(buckets) > 2
    assert len({bucket.params.untyped_storage().data_ptr() for bucket in buckets}) == len(buckets)
    trainer.sync.start(trainer.schedule)
    [batch, *_] = trainer.task.batches(1)
    others = [bucket.params.clone() for bucket in buckets[1:]]
    values = [bucket.params.clone() for bucket in buckets]

    def gradients(freeing: bool) -> list[torch.Tensor]:
        torch._foreach_zero_(trainer.buffers.grads)
        loss = trainer.task.loss(trainer.stages[0]({}, batch), batch)
        if freeing:
            for bucket in buckets:
                bucket.free()
            assert all(bucket.params.untyped_storage().nbytes() == 0 for bucket in buckets)
            for bucket, value in zip(buckets, values, strict=True):
                bucket.refill(value)
        trainer.sync._expected = 1000  # no reduction
        loss.backward()
        return [grads.clone() for grads in trainer.buffers.grads]

    plain, freed = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, freed, strict=True))
    assert any(grads.any() for grads in plain)
    buckets[0].free()
    assert all(torch.equal(bucket.params, other) for bucket, other in zip(buckets[1:], others, strict=True))
    trainer.close()
