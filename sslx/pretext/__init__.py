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
    "simclr": "sslx.pretext.simclr:SimClr",  # tell a row's other view from those of all other rows
    "moco_v3": "sslx.pretext.moco_v3:MocoV3",  # the same, as a moving average of oneself sees them
    "byol": "sslx.pretext.byol:Byol",  # predict what a moving average of oneself makes of the other view
    "simsiam": "sslx.pretext.simsiam:SimSiam",  # predict what one makes of the other view oneself
    "barlow_twins": "sslx.pretext.barlow_twins:BarlowTwins",  # features of two views correlate, each with its own only
    "vicreg": "sslx.pretext.vicreg:Vicreg",  # features of two views agree, vary, and do not repeat each other
    "swav": "sslx.pretext.swav:Swav",  # tell the cluster that another crop was assigned to
    "dino": "sslx.pretext.dino:Dino",  # say of any crop what a moving average of oneself says of the large ones
    "ibot": "sslx.pretext.ibot:Ibot",  # and of hidden patches what it says of them
    "infomax": "sslx.pretext.infomax:Infomax",  # a row's summary tells of each of its places, and of no other row's
    "ijepa": "sslx.pretext.ijepa:IJepa",  # predict a teacher's view of blocks of a picture from the rest
    "data2vec": "sslx.pretext.data2vec:Data2vec",  # predict a teacher's view of hidden patches, several masks at once
}
