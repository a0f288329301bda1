"""A base and its experts: aligned by name, read lazily, a chunk of rows at a time."""
