"""An optimizer over flat buffers: update rules, whole matrices, the learning rate and the global gradient norm."""
