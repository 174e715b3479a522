"""What is known of the health of a replica: its state, the reason for it, and the evidence that moves it."""
