"""Learning on the device: trainers of LoRA factors over a frozen base, and the clients that drive them."""
