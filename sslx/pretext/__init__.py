"""Index of the pretext tasks: ``config.pretext.name`` to class."""

PRETEXTS = {
    "mlm": "sslx.pretext.mlm:MaskedLanguageModel",  # predict masked tokens, optionally the next sentence or its order
    "clm": "sslx.pretext.clm:CausalLanguageModel",  # predict the next token
    "electra": "sslx.pretext.electra:Electra",  # tell the tokens that a generator has replaced
    "span_context": "sslx.pretext.span_context:SpanContext",  # predict a teacher's view of masked spans
}
