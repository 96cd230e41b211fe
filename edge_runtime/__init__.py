"""What runs on every device and on the mini-PC host."""
