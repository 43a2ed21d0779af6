"""What is in memory: the account of activations."""
