"""What pipeline, edge_runtime and server agree on byte for byte."""
