"""Packs in use: one model in memory, every task of a pack on demand."""
