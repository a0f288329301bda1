"""`personae demo`: a family of experts trained, packed and judged in about two minutes."""
