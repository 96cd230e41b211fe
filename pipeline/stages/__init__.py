"""One thin file a stage: load inputs, call the library, write outputs and metrics."""
