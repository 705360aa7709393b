"""One decoder for all families, the family table, and reading and writing checkpoints."""
