"""OpenAI-compatible requests and errors: bytes in, Request or BadRequest out. Pure."""
