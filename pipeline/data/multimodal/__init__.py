"""Pictures and sound with their texts: checked, stripped of metadata, sized for a processor, written as tar shards."""
