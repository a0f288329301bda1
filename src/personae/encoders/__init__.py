"""Text encoders: what texts are about, as vectors."""

from personae.encoders.text import ENCODERS, TransformersEncoder, text_encoder

__all__ = ["ENCODERS", "TransformersEncoder", "text_encoder"]
