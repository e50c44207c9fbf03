"""Gradient statistics for aligning large reasoning models: bias, variance and the optimal BVPO mixing weight."""

__version__ = "0.1.0"
