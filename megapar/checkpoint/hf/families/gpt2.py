"""GPT-2: learned positions, LayerNorm, biases. Its matrices are [in, out] on disk, and q, k and v are one."""

from megapar.checkpoint.hf.family import Family, Field, Stored, linear

_layer, _ours = "{p}h.{}", "layers.{}"
_norms = {f"{_layer}.ln_1": f"{_ours}.norm1", f"{_layer}.ln_2": f"{_ours}.norm2", "{p}ln_f": "norm"}

FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        (
            Stored("{p}wte.weight", ("embedding.weight",)),
            Stored("{p}wpe.weight", ("positions.weight",)),
            *(one for disk, name in _norms.items() for one in linear(disk, name)),
            *linear(f"{_layer}.attn.c_attn", *(f"{_ours}.attention.{one}" for one in "qkv"), transposed=True),
            *linear(f"{_layer}.attn.c_proj", f"{_ours}.attention.out", transposed=True),
            *linear(f"{_layer}.mlp.c_fc", f"{_ours}.mlp.up", transposed=True),
            *linear(f"{_layer}.mlp.c_proj", f"{_ours}.mlp.down", transposed=True),
            Stored("lm_head.weight", ("head.weight",)),
        ),
        (
            Field("vocab_size", "vocab_size", 50257),
            Field("n_embd", "hidden", 768),
            Field("n_layer", "layers", 12),
            Field("n_head", "heads", 12),
            Field("n_inner", "ffn"),
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            Field("initializer_range", "init_std", 0.02),
            Field("tie_word_embeddings", "tied", True),
            Field(
                "activation_function",
                "activation",
                "gelu_new",
                {"gelu": ("gelu_new", "gelu_pytorch_tanh"), "gelu_erf": "gelu"},
            ),
        ),
        fixed={"norm": "layernorm", "position": "learned", "bias": True},
        must={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        length="n_positions",
        default_length=1024,
        prefixes=("transformer.", ""),
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    ),
)
