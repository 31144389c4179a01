"""The decode loop and its parts: draft, search, verify, accept, commit."""
