"""Where responses come from: prompts, engines, rewards, preference pairs, traces."""
