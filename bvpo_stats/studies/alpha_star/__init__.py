"""The alpha-star study: the optimal mixing weight of a model, with its interval."""
