"""What a model can do, measured on the model itself."""
