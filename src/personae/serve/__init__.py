"""A server of packs: HTTP requests of any task, answered in mixed batches by one model."""
