"""Accuracy of a model on a data set: clean and under attack, the same code at every place.

evaluator    clean, PGD-n and CW-n accuracy, in training, at its end and on its own
autoattack   AutoAttack on the examples of a data set, with its audit
"""
