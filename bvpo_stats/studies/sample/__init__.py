"""The sample study: responses on record, from any engine."""
