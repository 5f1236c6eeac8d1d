"""Index of the verbs: what a trained run can be asked for. A run's own verb is the first here that it can do."""

VERBS = {
    "fill": "sslx.inference.fill:Fill",  # the likeliest tokens for each mask of a text
    "generate": "sslx.inference.generate:Generate",  # how a text goes on
    "classify": "sslx.inference.classify:Classify",  # a text's label, with probabilities
    "embed": "sslx.inference.embed:Embed",  # one vector for a text
}
