"""The traces study: the trace bank."""
