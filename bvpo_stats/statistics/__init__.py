"""Pure mathematics on arrays: streaming moments, intervals, alpha curves. Knows nothing of language models."""
