"""bpd_jax: blockwise parallel decoding on T5-style encoder-decoders."""
