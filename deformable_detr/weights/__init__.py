"""Files of weights: our own, and those that others published. Chapter 11."""
