"""Version 1 of the wire: `embedding.proto`, its generated stubs, and `codec`, the arithmetic of its bytes."""
