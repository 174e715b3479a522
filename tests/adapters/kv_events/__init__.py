"""What engines tell of their caches: recorded bytes, and every fault of the wire against a real ZMQ publisher on loopback."""
