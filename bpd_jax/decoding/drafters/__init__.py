"""Drafters: what proposes the tokens after the root."""
