"""What a model's outputs are worth: exactness now, quality and reports beside it."""
