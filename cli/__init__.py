"""The ``bvpo-stats`` command: thin wrappers over studies; nothing heavy is imported before it is needed."""
