"""What tests of several areas share: a real Envoy, a free port, a wait with a deadline."""
