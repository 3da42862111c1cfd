"""Accuracy of a model on a data set, clean and under attack.

evaluator    clean, PGD-n, CW-n and AutoAttack accuracy, in training and after it
protocol     evaluations by name, and the records of their results
autoattack   AutoAttack on the examples of a data set, with its audit
curves       an attack at several eps, and the union over norms
transfer     models on the adversarial images of others
"""
