"""Files of weights: our own format, the official one and Hugging Face's. Chapter published_weights.

`published` loads and saves; `deformable_detr` and `detr` have one model's names each; `classes`
fits a model to other classes.
"""
