"""Transformers, written once and readable without knowing a layout: a room of parts.

| file           | what                                                                         |
|----------------|------------------------------------------------------------------------------|
| `embedding.py` | token ids, learned positions and token types to the residual stream          |
| `attention.py` | grouped-query attention                                                      |
| `mlp.py`       | the gated or plain MLP                                                       |
| `layer.py`     | a residual block of both, and dropout                                        |
| `head.py`      | the last norm and the logits, or hidden states                               |
| `tokens.py`    | where the tokens of a micro-batch stand: made once per forward, read by all   |
| `stage.py`     | a pipeline stage: a run of parts (`megapar.config.model.Part`)               |

Shape letters: T tokens of a micro-batch (sample b, position s is token b*S + s), B samples, S positions, H hidden,
N query heads, K key/value heads, D channels of a head, F inner width of the MLP, V vocabulary. Under tensor parallelism
N, K, F and V are this rank's share; under sequence parallelism so is T outside attention and MLP (written t).
"""
