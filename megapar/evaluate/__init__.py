"""Figures of a trained model on text and on questions of one's own, in any layout.

A way to evaluate is a file of `kinds/` with one object, `EVALUATION = Evaluation(...)`; the key that names its data is
the file's name.
"""
