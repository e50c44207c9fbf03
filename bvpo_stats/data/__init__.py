"""Plain records and how they come about: prompts, completions, preference pairs, trace banks."""
