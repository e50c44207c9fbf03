"""Objectives as weights on scores, and the per-prompt gradients g_t, g_e and marginal."""
