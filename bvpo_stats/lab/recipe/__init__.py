"""How the embedded model is made: its training recipe, and what it is measured by."""
