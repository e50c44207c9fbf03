"""An enumerable reasoning model: exact marginals, biases, covariances and alpha*."""
