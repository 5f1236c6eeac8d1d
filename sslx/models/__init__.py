"""Index of the models: ``config.model.name`` to the class of its configuration, which makes the encoder."""

MODELS = {
    "bert": "sslx.models.bert:BertConfig",  # sees both ways; the original, ModernBERT-like, RoBERTa and ELECTRA
    "gpt": "sslx.models.gpt:GptConfig",  # sees what came before; GPT-2 or LLaMA-like
    "vit": "sslx.models.vit:VitConfig",  # patches of an image
}
