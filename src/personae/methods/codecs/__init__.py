"""Codecs, one file each: a delta to parts and back."""
