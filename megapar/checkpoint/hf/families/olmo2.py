"""OLMo 2: norms of the outputs of attention and MLP, and of q and k over all heads."""

from megapar.checkpoint.hf.family import Family, Field
from megapar.checkpoint.hf.fields import GROUPED, INIT, INV_FREQ, SILU, SIZES, decoder, rope, write_rope

NORMS = {"post_attention_layernorm": "norm1", "post_feedforward_layernorm": "norm2"}

FAMILIES = (
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        decoder(NORMS),
        (
            *SIZES,
            *GROUPED[:1],
            INIT,
            SILU,
            Field("rms_norm_eps", "norm_eps", 1e-5),
            Field("tie_word_embeddings", "tied", False),
        ),
        fixed={"norm": "rmsnorm", "position": "rope", "norm_order": "output", "qk_norm": "all"},
        must={"attention_bias": False},
        read=lambda config, keys: rope(config),
        write=write_rope,
        ignored=INV_FREQ,
    ),
)
