"""Image embeddings at the size that you can afford: ask a matvae server for a prefix, search and classify on your own.

    from matvae_client import EmbeddingClient, PrefixIndex

    with EmbeddingClient("localhost:50051") as client:
        codes = client.embed(["a.png", "b.png"], dimensions=32, precision="int8")
    index = PrefixIndex(codes)

Needs no torch. FAISS, Pillow, safetensors and rich are loaded by the call that first needs them.
"""

from matvae_client._budget import Budget, Plan
from matvae_client._card import InputSpec, Limits, Metric, ModelCard, ModelSummary
from matvae_client._cascade import CascadeAnswers, CascadeClassifier, CascadeReport
from matvae_client._classifier import PrefixClassifier
from matvae_client._client import EmbeddingClient
from matvae_client._coalescer import Coalescer
from matvae_client._codes import Codes
from matvae_client._credentials import Credentials
from matvae_client._errors import (
    BudgetError,
    DeadlineError,
    FingerprintMismatchError,
    FormatError,
    ImageErrors,
    InvalidRequestError,
    ItemError,
    MatvaeError,
    MissingExtraError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from matvae_client._funnel import FunnelIndex
from matvae_client._galleries import GallerySummary
from matvae_client._images import ImageLike
from matvae_client._index import Neighbours, PrefixIndex
from matvae_client._store import CodesDirectory

__all__ = [
    "Budget",
    "BudgetError",
    "CascadeAnswers",
    "CascadeClassifier",
    "CascadeReport",
    "Coalescer",
    "Codes",
    "CodesDirectory",
    "Credentials",
    "DeadlineError",
    "EmbeddingClient",
    "FingerprintMismatchError",
    "FormatError",
    "FunnelIndex",
    "GallerySummary",
    "ImageErrors",
    "ImageLike",
    "InputSpec",
    "InvalidRequestError",
    "ItemError",
    "Limits",
    "MatvaeError",
    "Metric",
    "MissingExtraError",
    "ModelCard",
    "ModelSummary",
    "Neighbours",
    "NotFoundError",
    "OverloadedError",
    "Plan",
    "PrefixClassifier",
    "PrefixIndex",
    "ServerError",
    "UnauthenticatedError",
    "UnavailableError",
]
