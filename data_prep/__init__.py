"""Text to tokens: corpora, tokenizer training and Megatron's .bin/.idx files. Imports no torch."""
