"""The transformer and everything that teaches it: tokenizer, data, training, evaluation. Needs torch."""
