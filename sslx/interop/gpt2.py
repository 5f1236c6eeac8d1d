"""GPT-2 (Radford et al. 2019) in transformers: kernels lie as ours do, and queries, keys and values side by side."""

from sslx.interop.architecture import Architecture, Head, Tensor, dense, norm, one

LAYERS, THEIRS = "transformer/layers", "transformer.h.{}"
QKV = ("query", "key", "value")


def convolution(ours: str, theirs: str) -> tuple[Tensor, ...]:
    """Their ``Conv1D``, a dense layer [in, out]."""
    return one(f"{LAYERS}/{ours}/kernel", f"{THEIRS}.{theirs}.weight") + one(
        f"{LAYERS}/{ours}/bias", f"{THEIRS}.{theirs}.bias"
    )


GPT2 = Architecture(
    model_type="gpt2",
    model="gpt",
    base="GPT2Model",
    prefix="transformer",
    encoder=(
        *one("embeddings/word", "transformer.wte.weight", "vocabulary"),
        *one("embeddings/position", "transformer.wpe.weight"),
        *norm(f"{LAYERS}/attention_norm", f"{THEIRS}.ln_1"),
        Tensor(tuple(f"{LAYERS}/attention/{name}/kernel" for name in QKV), f"{THEIRS}.attn.c_attn.weight"),
        Tensor(tuple(f"{LAYERS}/attention/{name}/bias" for name in QKV), f"{THEIRS}.attn.c_attn.bias"),
        *convolution("attention/out", "attn.c_proj"),
        *norm(f"{LAYERS}/mlp_norm", f"{THEIRS}.ln_2"),
        *convolution("mlp/up", "mlp.c_fc"),
        *convolution("mlp/down", "mlp.c_proj"),
        *norm("transformer/final_norm", "transformer.ln_f"),
    ),
    heads=(
        Head("GPT2LMHeadModel", {}),  # its head is the embedding table
        Head("GPT2ForTokenClassification", {"head": dense("", "classifier")}, reads="tokens"),
    ),
    fields={
        "n_embd": "width",
        "n_layer": "layers",
        "n_head": "heads",
        "n_inner": "mlp_width",
        "n_positions": "max_length",
        "activation_function": "activation",
        "layer_norm_epsilon": "norm_eps",
        "resid_pdrop": "dropout",
        "attn_pdrop": "attention_dropout",
    },
    repeated={"embd_pdrop": "resid_pdrop"},
    copies=(f"{THEIRS}.attn.bias", f"{THEIRS}.attn.masked_bias", "lm_head.weight"),  # the first two: the causal mask
    fixed_theirs={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    fixed_ours=dict(norm_position="pre", norm="layernorm", glu=False, bias=True, qk_norm=False, positions="learned"),
)
