"""AdamW on flat buffers, its learning rate and the global gradient norm."""
