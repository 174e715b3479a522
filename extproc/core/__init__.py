"""The pure core: it decides, keeps the ledger and learns. No clock, no await, no I/O; `now` and randomness are arguments."""
