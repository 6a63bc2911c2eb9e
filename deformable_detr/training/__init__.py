"""Training: settings and recipes, the loop, a run that resumes, a self-test before it.
Chapters training and training_at_every_size.

`loop` is to be read from top to bottom; `setup` makes what it works on.
"""
