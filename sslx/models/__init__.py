"""Index of the models: ``config.model.name`` to class."""

MODELS = {
    "bert": "sslx.models.bert:BertEncoder",  # bidirectional text encoder, original or ModernBERT-like
}
