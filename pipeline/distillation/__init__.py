"""Teacher signal, losses, pruning and the one training loop."""
