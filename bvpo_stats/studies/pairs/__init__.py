"""The pairs study: preference data from samples."""
