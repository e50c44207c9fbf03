"""What is asked of a language model: templates, log-probabilities, per-sequence scores."""
