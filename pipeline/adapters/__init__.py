"""Adapters that a federation proposes: reading a candidate, judging it, keeping the champion."""
