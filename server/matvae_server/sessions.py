"""onnxruntime sessions of the graphs of a bundle, which read no file beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

if TYPE_CHECKING:
    import onnxruntime

_FieldProto = descriptor_pb2.FieldDescriptorProto

_PACKAGE = "matvae.onnx"
_MESSAGES = {
    "Model": {"graph": (7, "Graph"), "training": (20, "Training"), "functions": (25, "Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"nodes": (7, "Node"), "attributes": (11, "Attribute")},
    "Graph": {"nodes": (1, "Node"), "initializers": (5, "Tensor"), "sparse": (15, "Sparse")},
    "Node": {"attributes": (5, "Attribute")},
    "Attribute": {
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "tensors": (10, "Tensor"),
        "graphs": (11, "Graph"),
        "sparse": (22, "Sparse"),
        "several_sparse": (23, "Sparse"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"external_data": (13, ""), "data_location": (14, "")},
}
"""Of onnx.proto, for which a server has no package, what leads to tensors; numbers and types as there.

Everything is read as repeated, so that of a field that comes twice each is seen.
"""

_EXTERNAL = 1


def open_session(graph: bytes, *, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU, `threads` wide.

    From bytes: those were checked against their hash, and the file may have changed since. Raises ValueError for a
    graph that wants other files, and whatever onnxruntime makes of one that is wrong.
    """
    import onnxruntime

    require_whole(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning burns a core between batches, which the event loop and the neighbours need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # the one that was looked at
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def require_whole(graph: bytes) -> None:
    """Raise ValueError where a tensor lies in another file: onnxruntime would read any of the working directory."""
    try:
        model = _MODEL.FromString(graph)
    except DecodeError as error:
        raise ValueError(f"it is no ONNX: {error}") from None
    if _has_external(model):
        raise ValueError("it keeps tensors in other files, which a bundle has not: save it with its weights inside")


def _has_external(message: Message) -> bool:
    if message.DESCRIPTOR.name == "Tensor":
        return any(field.name == "external_data" or _EXTERNAL in value for field, value in message.ListFields())
    return any(_has_external(part) for _, parts in message.ListFields() for part in parts)


def _model() -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto(name="onnx.proto", package=_PACKAGE, syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=_FieldProto.LABEL_REPEATED)
            if kind:
                added.type, added.type_name = _FieldProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                added.type = _FieldProto.TYPE_INT32 if field == "data_location" else _FieldProto.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


_MODEL = _model()
