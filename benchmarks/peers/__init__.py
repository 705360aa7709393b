"""Other engines, each in an environment of its own, timed through one small protocol (`README.md`)."""
