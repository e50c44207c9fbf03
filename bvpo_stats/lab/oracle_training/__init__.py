"""Training on the enumerable model: estimated, fixed and exact alphas against each other on exact gradients."""
