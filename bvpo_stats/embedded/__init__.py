"""The embedded reasoning model: task, tokenizer, training recipe and weights."""
