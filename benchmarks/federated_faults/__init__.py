"""Federations that are disturbed: killed processes, devices that lie, devices that are late."""
