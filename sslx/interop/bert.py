"""BERT (arXiv 1810.04805) in transformers: ``BertModel`` and its heads."""

from sslx.interop.architecture import Architecture, Head, Tensor, dense, norm, one, token_heads


def encoder(prefix: str) -> tuple[Tensor, ...]:
    """The encoder's table, which RoBERTa and ELECTRA share under names of their own."""
    here, layer = "transformer/layers", f"{prefix}.encoder.layer.{{}}"
    return (
        *one("embeddings/word", f"{prefix}.embeddings.word_embeddings.weight", "vocabulary"),
        *one("embeddings/position", f"{prefix}.embeddings.position_embeddings.weight", "positions"),
        *one("embeddings/token_type", f"{prefix}.embeddings.token_type_embeddings.weight"),
        *norm("embeddings/norm", f"{prefix}.embeddings.LayerNorm"),
        *dense(f"{here}/attention/query", f"{layer}.attention.self.query"),
        *dense(f"{here}/attention/key", f"{layer}.attention.self.key"),
        *dense(f"{here}/attention/value", f"{layer}.attention.self.value"),
        *dense(f"{here}/attention/out", f"{layer}.attention.output.dense"),
        *norm(f"{here}/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *dense(f"{here}/mlp/up", f"{layer}.intermediate.dense"),
        *dense(f"{here}/mlp/down", f"{layer}.output.dense"),
        *norm(f"{here}/mlp_norm", f"{layer}.output.LayerNorm"),
    )


FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "type_vocab_size": "token_types",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
FIXED_THEIRS = {"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
FIXED_OURS = dict(
    norm_position="post", norm="layernorm", glu=False, bias=True, qk_norm=False, positions="learned", embed_width=None
)

MLM_HEAD = (
    *dense("transform", "cls.predictions.transform.dense"),
    *norm("norm", "cls.predictions.transform.LayerNorm"),
    *one("bias", "cls.predictions.bias", "vocabulary"),
)
POOLER = dense("dense", "bert.pooler.dense")

BERT = Architecture(
    model_type="bert",
    model="bert",
    base="BertModel",
    prefix="bert",
    encoder=encoder("bert"),
    heads=(
        Head("BertForMaskedLM", {"mlm_head": MLM_HEAD}),
        Head(
            "BertForPreTraining",
            {"mlm_head": MLM_HEAD, "pooler": POOLER, "sentence_head": dense("", "cls.seq_relationship")},
        ),
        Head("BertForSequenceClassification", {"pooler": POOLER, "head": dense("", "classifier")}),
        *token_heads("Bert"),
    ),
    fields=FIELDS,
    fixed_theirs=FIXED_THEIRS | {"position_embedding_type": "absolute"},
    fixed_ours=FIXED_OURS,
    copies=("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
)
