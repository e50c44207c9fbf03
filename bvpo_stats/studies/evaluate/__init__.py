"""The evaluate study: the paper's evaluation protocol, base model and adapters in one run."""
