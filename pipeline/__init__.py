"""From a checkpoint to signed packages, on a workstation."""
