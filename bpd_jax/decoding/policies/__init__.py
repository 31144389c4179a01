"""Policies: how many tokens each row drafts, and how many of those are verified."""
