"""Scorers: what judges candidates by the tokens before them."""
