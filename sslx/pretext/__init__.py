"""Index of the pretext tasks: ``config.pretext.name`` to class."""

PRETEXTS = {
    "mlm": "sslx.pretext.mlm:MaskedLanguageModel",  # predict masked tokens, optionally the next sentence or its order
    "clm": "sslx.pretext.clm:CausalLanguageModel",  # predict the next token
    "electra": "sslx.pretext.electra:Electra",  # tell the tokens that a generator has replaced
    "span_context": "sslx.pretext.span_context:SpanContext",  # predict a teacher's view of masked spans
    "mae": "sslx.pretext.mae:Mae",  # see a quarter of a picture's patches, paint the rest
    "simmim": "sslx.pretext.simmim:SimMim",  # paint hidden squares of a picture from where they are hidden
    "igpt": "sslx.pretext.igpt:Igpt",  # predict each pixel's colour from those before it
    "rotation": "sslx.pretext.rotation:Rotation",  # tell by how many quarters a picture has been turned
    "relative_patch": "sslx.pretext.relative_patch:RelativePatch",  # tell where a piece of a picture lies
    "jigsaw": "sslx.pretext.jigsaw:Jigsaw",  # tell in which order nine pieces of a picture have been laid
}
