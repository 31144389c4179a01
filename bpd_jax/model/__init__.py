"""The T5-style encoder-decoder with parallel heads."""
