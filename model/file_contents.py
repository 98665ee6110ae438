"""What a file is by its first bytes, and what to do with it, for messages about a file that is no data or weights."""

from __future__ import annotations

from pathlib import Path

# First bytes of what is found in place of data or weights, and what it is. Capitals and white space in front do not
# matter.
_CONTENTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get` where it came from"),
    (b"<!doctype html", "an HTML page, perhaps of a login or an error: download the file itself"),
    (b"<html", "an HTML page, perhaps of a login or an error: download the file itself"),
    (b"<?xml", "an XML page, perhaps a server's error message: download the file itself"),
    (b"\x1f\x8b", "compressed by gzip: let its name end with .gz, or unpack it"),
    (b"bzh91ay&sy", "compressed by bzip2: unpack it"),
    (b"\xfd7zxz\x00", "compressed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"rar!\x1a\x07", "a RAR archive: unpack it"),
    (b"pk\x03\x04", "a zip archive (also .xlsx, and PyTorch's .pt): unpack or convert it"),
    (b"pk\x05\x06", "an empty zip archive: copy or download it again"),
    (b"\x93numpy", "a NumPy array: convert it where it came from"),
    (b"\x89hdf\r\n\x1a\n", "an HDF5 file, such as TensorFlow writes: convert it where it came from"),
    (b"gguf", "a GGUF file of llama.cpp: take the safetensors file that it was made from"),
    (b"sqlite format 3\x00", "an SQLite database: export its rows"),
)
_PICKLE = "which is never read, because it can run code: convert it where it came from"
_TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # torch.save before 1.6, behind two bytes
HEAD_BYTES = 512  # what describe_bytes needs


def describe_bytes(head: bytes) -> str | None:
    """What a file is, by its first bytes, if it is surely neither text nor a table; else None."""
    begins = head.lstrip().lower().startswith
    if begins(b"pk\x03\x04") and b"/data.pkl" in head[:HEAD_BYTES]:
        return f"a PyTorch checkpoint with a pickle inside, {_PICKLE}, with transformers' save_pretrained"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        if head[2:].startswith(_TORCH_MAGIC):
            return f"a PyTorch checkpoint of the old format, a pickle, {_PICKLE}, with transformers' save_pretrained"
        return f"a Python pickle, {_PICKLE}"
    if head.startswith((b"(dp0\n", b"(lp0\n", b"ccopy_reg\n", b"ccollections\n")):
        return f"a Python pickle of the oldest protocol, {_PICKLE}"
    for magic, description in _CONTENTS:
        if begins(magic):
            return description
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "a safetensors file, which holds tensors"
    return None


def describe_content(path: Path) -> str | None:
    """What a file is, with what to do, if its first bytes are surely neither text nor a table; else None.

    It begins with an article, as in "a Git LFS pointer, not the file itself: run `git lfs pull` where it came from".
    """
    if path.is_dir():
        return "a folder: name a file"
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return describe_bytes(head) if head else "an empty file: copy or download it again"
