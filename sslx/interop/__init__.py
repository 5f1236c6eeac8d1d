"""Index of the architectures that weights are exchanged with: ``model_type`` of transformers to its table."""

ARCHITECTURES = {
    "bert": "sslx.interop.bert:BERT",  # masked tokens, next sentence, sequence classification
    "roberta": "sslx.interop.roberta:ROBERTA",  # masked tokens, sequence classification
    "electra": "sslx.interop.electra:ELECTRA",  # discriminator, or the generator's masked tokens
    "gpt2": "sslx.interop.gpt2:GPT2",  # next token
    "vit": "sslx.interop.vit:VIT",  # image encoder, image classification
}
