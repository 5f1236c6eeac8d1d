"""Probes of frozen features. They take features and labels, whatever these are of.

linear (multinomial logistic regression, a grid chosen on validation) and knn (weighted nearest neighbours) measure;
text makes the features of labelled texts and of their bags of words; picture projects to two dimensions.
"""
