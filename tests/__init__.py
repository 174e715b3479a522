"""Tests of extproc; they mirror the package."""

from hypothesis import settings

# A busy machine is no failure: examples are bounded in number, not in time.
settings.register_profile("extproc", deadline=None)
settings.load_profile("extproc")
