"""The comments of the .proto file, from the descriptor set."""

from __future__ import annotations

from importlib import resources

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb


def names_of(message: type[Message]) -> list[str]:
    """Return the names of a message's fields."""
    return [field.name for field in message.DESCRIPTOR.fields]


def comments_of(message: type[Message]) -> dict[str, str]:
    """Return the comment of each field of a message."""
    file, comments = _file()
    index = [each.name for each in file.message_type].index(message.DESCRIPTOR.name)
    # FileDescriptorProto has messages in its field 4, DescriptorProto has fields in its field 2.
    return {name: comments[4, index, 2, number] for number, name in enumerate(names_of(message))}


def comments_of_rpcs() -> dict[str, str]:
    """Return the comment of each RPC."""
    file, comments = _file()
    # FileDescriptorProto has services in its field 6, ServiceDescriptorProto has methods in its field 2.
    return {method.name: comments[6, 0, 2, number] for number, method in enumerate(file.service[0].method)}


def _file() -> tuple[FileDescriptorProto, dict[tuple[int, ...], str]]:
    """Return the file of the API, and its comments by their paths."""
    files = FileDescriptorSet.FromString(resources.files("jobstatus.v1").joinpath("descriptor_set.binpb").read_bytes())
    (file,) = (file for file in files.file if file.name == pb.DESCRIPTOR.name)
    return file, {tuple(each.path): each.leading_comments.strip() for each in file.source_code_info.location}
