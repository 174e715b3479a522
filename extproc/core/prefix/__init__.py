"""Prefix blocks of a prompt and the index of who holds them."""
