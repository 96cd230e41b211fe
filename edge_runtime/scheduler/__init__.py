"""Who may use the device now."""
