"""Probes of frozen features. They take features and labels, whatever these are of.

linear (multinomial logistic regression, a grid chosen on validation), knn (weighted nearest neighbours) and few_shot
measure; text and images know rows and baselines of their modality; picture projects to two dimensions. `PROBES` is the
index, by ``Objective.modality``.
"""

PROBES = {
    "text": "sslx.probing.text:TextProbe",
    "images": "sslx.probing.images:ImageProbe",
}
