"""RoBERTa (arXiv 1907.11692) in transformers: BERT with one token type, and positions that count from ``pad_id + 1``.

``RobertaModel`` counts positions so, and no token looks up the rows before; they are left out here, zeros there.
"""

from sslx.interop.architecture import Architecture, Head, dense, norm, one, token_heads
from sslx.interop.bert import FIELDS, FIXED_OURS, FIXED_THEIRS, encoder

ROBERTA = Architecture(
    model_type="roberta",
    model="bert",
    base="RobertaModel",
    prefix="roberta",
    encoder=encoder("roberta"),
    heads=(
        Head(
            "RobertaForMaskedLM",
            {
                "mlm_head": (
                    *dense("transform", "lm_head.dense"),
                    *norm("norm", "lm_head.layer_norm"),
                    *one("bias", "lm_head.bias", "vocabulary"),
                )
            },
            activation="gelu",
        ),
        Head(
            "RobertaForSequenceClassification",
            {"pooler": dense("dense", "classifier.dense"), "head": dense("", "classifier.out_proj")},
        ),
        *token_heads("Roberta"),
    ),
    fields=FIELDS,
    fixed_theirs=FIXED_THEIRS | {"position_embedding_type": "absolute", "type_vocab_size": 1},
    fixed_ours=FIXED_OURS | {"token_types": 1},
    copies=("roberta.embeddings.position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias"),
    position_offset=True,
)
