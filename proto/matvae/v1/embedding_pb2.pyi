from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_FLOAT32: _ClassVar[Precision]
    PRECISION_FLOAT16: _ClassVar[Precision]
    PRECISION_INT8: _ClassVar[Precision]
    PRECISION_BINARY: _ClassVar[Precision]

class ComputePrecision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPUTE_PRECISION_UNSPECIFIED: _ClassVar[ComputePrecision]
    COMPUTE_PRECISION_FP32: _ClassVar[ComputePrecision]
    COMPUTE_PRECISION_BF16: _ClassVar[ComputePrecision]

class HeadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEAD_KIND_UNSPECIFIED: _ClassVar[HeadKind]
    HEAD_KIND_LOGISTIC: _ClassVar[HeadKind]
    HEAD_KIND_MLP: _ClassVar[HeadKind]
PRECISION_UNSPECIFIED: Precision
PRECISION_FLOAT32: Precision
PRECISION_FLOAT16: Precision
PRECISION_INT8: Precision
PRECISION_BINARY: Precision
COMPUTE_PRECISION_UNSPECIFIED: ComputePrecision
COMPUTE_PRECISION_FP32: ComputePrecision
COMPUTE_PRECISION_BF16: ComputePrecision
HEAD_KIND_UNSPECIFIED: HeadKind
HEAD_KIND_LOGISTIC: HeadKind
HEAD_KIND_MLP: HeadKind

class Codes(_message.Message):
    __slots__ = ("data", "count", "dimensions", "offset", "precision", "fingerprint")
    DATA_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    count: int
    dimensions: int
    offset: int
    precision: Precision
    fingerprint: str
    def __init__(self, data: _Optional[bytes] = ..., count: _Optional[int] = ..., dimensions: _Optional[int] = ..., offset: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class RawImages(_message.Message):
    __slots__ = ("pixels", "shape")
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    pixels: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pixels: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class EncodedImages(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, files: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("model", "raw", "encoded", "dimensions", "offset", "precision", "expected_fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    raw: RawImages
    encoded: EncodedImages
    dimensions: int
    offset: int
    precision: Precision
    expected_fingerprint: str
    def __init__(self, model: _Optional[str] = ..., raw: _Optional[_Union[RawImages, _Mapping]] = ..., encoded: _Optional[_Union[EncodedImages, _Mapping]] = ..., dimensions: _Optional[int] = ..., offset: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., expected_fingerprint: _Optional[str] = ...) -> None: ...

class ItemError(_message.Message):
    __slots__ = ("index", "code", "message")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    index: int
    code: int
    message: str
    def __init__(self, index: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("codes", "errors", "compute_precision")
    CODES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_PRECISION_FIELD_NUMBER: _ClassVar[int]
    codes: Codes
    errors: _containers.RepeatedCompositeFieldContainer[ItemError]
    compute_precision: ComputePrecision
    def __init__(self, codes: _Optional[_Union[Codes, _Mapping]] = ..., errors: _Optional[_Iterable[_Union[ItemError, _Mapping]]] = ..., compute_precision: _Optional[_Union[ComputePrecision, str]] = ...) -> None: ...

class EmbedStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: EmbedRequest
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[EmbedRequest, _Mapping]] = ...) -> None: ...

class CallError(_message.Message):
    __slots__ = ("code", "message", "field", "retry_after_ms", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    field: str
    retry_after_ms: int
    reason: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class EmbedStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    response: EmbedResponse
    error: CallError
    def __init__(self, id: _Optional[int] = ..., response: _Optional[_Union[EmbedResponse, _Mapping]] = ..., error: _Optional[_Union[CallError, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("model", "codes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CODES_FIELD_NUMBER: _ClassVar[int]
    model: str
    codes: Codes
    def __init__(self, model: _Optional[str] = ..., codes: _Optional[_Union[Codes, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("images", "dimensions")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    images: RawImages
    dimensions: int
    def __init__(self, images: _Optional[_Union[RawImages, _Mapping]] = ..., dimensions: _Optional[int] = ...) -> None: ...

class InputSpec(_message.Message):
    __slots__ = ("height", "width", "channels", "resize_rule")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    RESIZE_RULE_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    channels: int
    resize_rule: str
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., resize_rule: _Optional[str] = ...) -> None: ...

class Quantiser(_message.Message):
    __slots__ = ("int8_low", "int8_high", "binary_threshold", "binary_below", "binary_above")
    INT8_LOW_FIELD_NUMBER: _ClassVar[int]
    INT8_HIGH_FIELD_NUMBER: _ClassVar[int]
    BINARY_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    BINARY_BELOW_FIELD_NUMBER: _ClassVar[int]
    BINARY_ABOVE_FIELD_NUMBER: _ClassVar[int]
    int8_low: bytes
    int8_high: bytes
    binary_threshold: bytes
    binary_below: bytes
    binary_above: bytes
    def __init__(self, int8_low: _Optional[bytes] = ..., int8_high: _Optional[bytes] = ..., binary_threshold: _Optional[bytes] = ..., binary_below: _Optional[bytes] = ..., binary_above: _Optional[bytes] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "dimensions", "precision", "value", "n", "interval_low", "interval_high", "split")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_LOW_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_HIGH_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dimensions: int
    precision: Precision
    value: float
    n: int
    interval_low: float
    interval_high: float
    split: str
    def __init__(self, name: _Optional[str] = ..., dimensions: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., value: _Optional[float] = ..., n: _Optional[int] = ..., interval_low: _Optional[float] = ..., interval_high: _Optional[float] = ..., split: _Optional[str] = ...) -> None: ...

class HeadInfo(_message.Message):
    __slots__ = ("kind", "dimensions")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    kind: HeadKind
    dimensions: int
    def __init__(self, kind: _Optional[_Union[HeadKind, str]] = ..., dimensions: _Optional[int] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("format", "name", "fingerprint", "description", "license", "input", "dimensions", "prefixes", "classes", "quantiser", "metrics", "heads", "provenance")
    class ProvenanceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    QUANTISER_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    format: int
    name: str
    fingerprint: str
    description: str
    license: str
    input: InputSpec
    dimensions: int
    prefixes: _containers.RepeatedScalarFieldContainer[int]
    classes: _containers.RepeatedScalarFieldContainer[str]
    quantiser: Quantiser
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    heads: _containers.RepeatedCompositeFieldContainer[HeadInfo]
    provenance: _containers.ScalarMap[str, str]
    def __init__(self, format: _Optional[int] = ..., name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., description: _Optional[str] = ..., license: _Optional[str] = ..., input: _Optional[_Union[InputSpec, _Mapping]] = ..., dimensions: _Optional[int] = ..., prefixes: _Optional[_Iterable[int]] = ..., classes: _Optional[_Iterable[str]] = ..., quantiser: _Optional[_Union[Quantiser, _Mapping]] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., heads: _Optional[_Iterable[_Union[HeadInfo, _Mapping]]] = ..., provenance: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_images_per_request", "max_message_bytes", "max_image_pixels", "min_image_side", "max_request_pixels", "max_queue_images", "min_ping_interval_ms")
    MAX_IMAGES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MIN_IMAGE_SIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MIN_PING_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    max_images_per_request: int
    max_message_bytes: int
    max_image_pixels: int
    min_image_side: int
    max_request_pixels: int
    max_queue_images: int
    min_ping_interval_ms: int
    def __init__(self, max_images_per_request: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., min_image_side: _Optional[int] = ..., max_request_pixels: _Optional[int] = ..., max_queue_images: _Optional[int] = ..., min_ping_interval_ms: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("card", "limits", "runtime", "compute_precision", "server_version")
    CARD_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_PRECISION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    card: ModelCard
    limits: Limits
    runtime: str
    compute_precision: ComputePrecision
    server_version: str
    def __init__(self, card: _Optional[_Union[ModelCard, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., runtime: _Optional[str] = ..., compute_precision: _Optional[_Union[ComputePrecision, str]] = ..., server_version: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelSummary(_message.Message):
    __slots__ = ("name", "fingerprint", "is_default")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    is_default: bool
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., is_default: bool = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelSummary]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelSummary, _Mapping]]] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ("model", "dimensions", "kind", "expected_fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    dimensions: int
    kind: HeadKind
    expected_fingerprint: str
    def __init__(self, model: _Optional[str] = ..., dimensions: _Optional[int] = ..., kind: _Optional[_Union[HeadKind, str]] = ..., expected_fingerprint: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("data", "shape")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class DenseLayer(_message.Message):
    __slots__ = ("weight", "bias")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    weight: Tensor
    bias: Tensor
    def __init__(self, weight: _Optional[_Union[Tensor, _Mapping]] = ..., bias: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("kind", "dimensions", "fingerprint", "classes", "mean", "scale", "layers")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    kind: HeadKind
    dimensions: int
    fingerprint: str
    classes: _containers.RepeatedScalarFieldContainer[str]
    mean: Tensor
    scale: Tensor
    layers: _containers.RepeatedCompositeFieldContainer[DenseLayer]
    def __init__(self, kind: _Optional[_Union[HeadKind, str]] = ..., dimensions: _Optional[int] = ..., fingerprint: _Optional[str] = ..., classes: _Optional[_Iterable[str]] = ..., mean: _Optional[_Union[Tensor, _Mapping]] = ..., scale: _Optional[_Union[Tensor, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[DenseLayer, _Mapping]]] = ...) -> None: ...

class GetHeadResponse(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: Head
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class ListGalleriesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GallerySummary(_message.Message):
    __slots__ = ("name", "fingerprint", "count", "version", "dimensions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    count: int
    version: int
    dimensions: int
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., count: _Optional[int] = ..., version: _Optional[int] = ..., dimensions: _Optional[int] = ...) -> None: ...

class ListGalleriesResponse(_message.Message):
    __slots__ = ("galleries",)
    GALLERIES_FIELD_NUMBER: _ClassVar[int]
    galleries: _containers.RepeatedCompositeFieldContainer[GallerySummary]
    def __init__(self, galleries: _Optional[_Iterable[_Union[GallerySummary, _Mapping]]] = ...) -> None: ...

class PullGalleryRequest(_message.Message):
    __slots__ = ("gallery", "dimensions", "offset", "precision", "expected_fingerprint", "since_version", "version", "position", "ids")
    GALLERY_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    gallery: str
    dimensions: int
    offset: int
    precision: Precision
    expected_fingerprint: str
    since_version: int
    version: int
    position: int
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, gallery: _Optional[str] = ..., dimensions: _Optional[int] = ..., offset: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., expected_fingerprint: _Optional[str] = ..., since_version: _Optional[int] = ..., version: _Optional[int] = ..., position: _Optional[int] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PullStart(_message.Message):
    __slots__ = ("version", "since_version", "position", "count")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    version: int
    since_version: int
    position: int
    count: int
    def __init__(self, version: _Optional[int] = ..., since_version: _Optional[int] = ..., position: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class GalleryRemovals(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GalleryRows(_message.Message):
    __slots__ = ("codes", "ids")
    CODES_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    codes: Codes
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, codes: _Optional[_Union[Codes, _Mapping]] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PullEnd(_message.Message):
    __slots__ = ("count", "sha256", "newest_version")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    count: int
    sha256: str
    newest_version: int
    def __init__(self, count: _Optional[int] = ..., sha256: _Optional[str] = ..., newest_version: _Optional[int] = ...) -> None: ...

class PullGalleryResponse(_message.Message):
    __slots__ = ("start", "removals", "rows", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    REMOVALS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: PullStart
    removals: GalleryRemovals
    rows: GalleryRows
    end: PullEnd
    def __init__(self, start: _Optional[_Union[PullStart, _Mapping]] = ..., removals: _Optional[_Union[GalleryRemovals, _Mapping]] = ..., rows: _Optional[_Union[GalleryRows, _Mapping]] = ..., end: _Optional[_Union[PullEnd, _Mapping]] = ...) -> None: ...
