"""matvae: adaptive image embeddings. This package holds the wire contract; see `matvae.v1`."""

__version__ = "0.1.0"
