"""Pure tensor primitives."""
