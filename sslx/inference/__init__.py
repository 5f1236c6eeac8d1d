"""Index of the verbs by modality: what a trained run can be asked for. Its own verb is the first that it can do."""

VERBS = {
    "fill": "sslx.inference.fill:Fill",  # the likeliest tokens for each mask of a text
    "generate": "sslx.inference.generate:Generate",  # how a text goes on
    "classify": "sslx.inference.classify:Classify",  # the label of a text or a pair, with probabilities
    "score": "sslx.inference.score:Score",  # the number of a text or a pair
    "tag": "sslx.inference.tag:Tag",  # a tag for each word of a text
    "answer": "sslx.inference.answer:AnswerQuestion",  # where in a context the answer to a question is
    "embed": "sslx.inference.embed:Embed",  # one vector for a text
}
PICTURE_VERBS = {
    "classify": "sslx.inference.pictures:ClassifyPictures",  # the label of a picture, with probabilities
    "embed": "sslx.inference.pictures:EmbedPictures",  # one vector for a picture
}
BY_MODALITY = {"text": VERBS, "images": PICTURE_VERBS}
