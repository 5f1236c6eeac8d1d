"""ELECTRA (arXiv 2003.10555) in transformers: BERT whose embeddings may be narrower, with a discriminator on top.

A model of ours that is trained by masked tokens and has narrow embeddings is what they call the generator.
"""

from sslx.interop.architecture import Architecture, Head, dense, norm, one, token_heads
from sslx.interop.bert import FIELDS, FIXED_OURS, FIXED_THEIRS, encoder

ELECTRA = Architecture(
    model_type="electra",
    model="bert",
    base="ElectraModel",
    prefix="electra",
    encoder=(*encoder("electra"), *dense("embeddings/project", "electra.embeddings_project")),
    heads=(
        Head(
            "ElectraForPreTraining",
            {
                "discriminator_head": (
                    *dense("transform", "discriminator_predictions.dense"),
                    *dense("out", "discriminator_predictions.dense_prediction"),
                )
            },
        ),
        Head(
            "ElectraForMaskedLM",
            {
                "mlm_head": (
                    *dense("transform", "generator_predictions.dense"),
                    *norm("norm", "generator_predictions.LayerNorm"),
                    *one("bias", "generator_lm_head.bias", "vocabulary"),
                )
            },
            activation="gelu",
        ),
        *token_heads("Electra"),
    ),
    fields=FIELDS | {"embedding_size": "embed_width"},
    fixed_theirs=FIXED_THEIRS | {"position_embedding_type": "absolute"},
    fixed_ours={name: value for name, value in FIXED_OURS.items() if name != "embed_width"},
    copies=("electra.embeddings.position_ids", "generator_lm_head.weight"),
    left_out=frozenset({"generator"}),
)
