"""Sampling engines: whoever turns prompts into token ids, behind one small interface."""
