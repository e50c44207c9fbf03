"""Studies: configuration in, report out."""
