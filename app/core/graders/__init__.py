"""Graders: what the answer of a model is worth, told by a rule, a measure or another model. docs/evaluations.md defines each."""
