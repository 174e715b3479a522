"""The outside world, one narrow Protocol each: discovery, scrapes, metrics, the admin server."""
