"""From float weights to the codes of the design."""
