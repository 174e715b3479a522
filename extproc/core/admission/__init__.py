"""Requests that no replica can start soon: who waits, who goes first, and who is refused."""
