"""Implementations of the Backend protocol, imported only when one is opened."""
