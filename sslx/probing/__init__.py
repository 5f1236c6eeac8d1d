"""Probes of frozen features. They take features and labels, whatever these are of.

linear (multinomial logistic regression, a grid chosen on validation), knn (weighted nearest neighbours) and few_shot
measure, on the features of features; text and images know rows and baselines of their modality (`probe.Probe`); picture
projects to two dimensions, attention shows where a ViT looks; diagnostics say how features spread, without labels, also
while a run trains. `PROBES` is the index, by ``Objective.modality``.
"""

PROBES = {
    "text": "sslx.probing.text:TextProbe",
    "images": "sslx.probing.images:ImageProbe",
}
