"""Text to tokens to samples: tokenizer, token files, their manifest, the train/validation split and the sample order.

`prepare` runs once in the launcher; the workers open what it left with `SampleSet`. Nothing here imports torch.
"""
