"""The simulated replica: a vLLM-like engine, step by step, and the same engine behind HTTP."""
