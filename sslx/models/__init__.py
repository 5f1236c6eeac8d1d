"""Index of the models: ``config.model.name`` to the class of its configuration, which makes the encoder."""

MODELS = {
    "bert": "sslx.models.bert:BertConfig",  # sees both ways; the original, ModernBERT-like, RoBERTa and ELECTRA
    "gpt": "sslx.models.gpt:GptConfig",  # sees what came before; GPT-2 or LLaMA-like
    "vit": "sslx.models.vit:VitConfig",  # patches of an image
    "resnet": "sslx.models.resnet:ResnetConfig",  # convolutions with batch normalisation
    "convnext": "sslx.models.convnext:ConvnextConfig",  # convolutions without
    "igpt": "sslx.models.igpt:IgptConfig",  # the colours of an image's pixels, one after the other
}
