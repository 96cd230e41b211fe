"""The Flower side: rounds of LoRA updates (not built yet; see CHANGELOG.md)."""
