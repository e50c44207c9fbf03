"""Files that outlive a kill: run folders, append-only rows, tables."""
