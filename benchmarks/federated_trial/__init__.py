"""A federation simulated on one GPU: every client of a round, and every run of a group, in one batch."""
