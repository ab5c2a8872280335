# SPDX-License-Identifier: MIT
"""Model files: a network's weights and architecture in one `.safetensors` file, written whole or not at all.

The layout is the public safetensors one, so any safetensors reader opens our files:

    8 bytes   N, the length of the header, little endian
    N bytes   JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, …}
    the rest  the arrays, row-major, little endian, back to back

The architecture is JSON text under the metadata key "chainrule". Nothing in a file is ever executed. A file
is hostile until it is proven sound: each size is checked against the real file before memory is asked for,
and a SHA-256 of the whole file (its own 64 digits counted as zeros) tells damage from data. Equal content
gives equal bytes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import devices
from .checks import short

if TYPE_CHECKING:
    from .model import Sequential

    Path = str | os.PathLike[str]
    Arrays = dict[str, NDArray[Any]]

SUFFIX = ".safetensors"
FORMAT = 1  # of the JSON under ARCHITECTURE; a reader refuses larger numbers
ARCHITECTURE = "chainrule"
RUN = "chainrule.run"  # in the checkpoint of a fit; its arrays have names that begin with "run."
CHECKSUM = "chainrule.sha256"
MAX_HEADER = 100_000_000  # the safetensors rule
MAX_DIMENSIONS = 32  # what every supported NumPy can hold
_BLANK = b"0" * 64  # stands in for the checksum while the checksum is computed

_DTYPES = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4",
    "F16": "<f2", "I16": "<i2", "U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {text: name for name, text in _DTYPES.items()}


# ------------------------------------------------------------ networks


def save(net: Sequential, path: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write a network to one file: `net.save(path, extra)`, which says it all.

    Example:
        >>> import chainrule as cr, tempfile
        >>> net = cr.mlp([3, 4, 2], seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(net, f"{folder}/net.safetensors", {"note": "first try"})
        ...     again, note = load_with_metadata(f"{folder}/net.safetensors")
        >>> note, bool((again.state_dict()["0.weight"] == net.state_dict()["0.weight"]).all())
        ({'note': 'first try'}, True)
    """
    metadata = _texts(extra or {})
    suffix = require_suffix("save", path, SUFFIX, ".onnx", ".h")
    if suffix != SUFFIX:
        from .export import c_header, onnx_bytes

        stem = os.path.splitext(os.path.basename(os.fsdecode(path)))[0]
        content = onnx_bytes(net, metadata) if suffix == ".onnx" else c_header(net, metadata, stem)
        write_atomically(path, [content])
        return
    if reserved := metadata.keys() & {ARCHITECTURE, RUN}:
        raise ValueError(f"[save] extra: expected your own keys, got {min(reserved)!r}, one of chainrule's")
    metadata[ARCHITECTURE] = architecture_text(net)
    write_safetensors(path, net.state_dict(), metadata)


def architecture_text(net: Sequential) -> str:
    """The JSON under ARCHITECTURE; TypeError for a layer of the user's own that cannot be described."""
    config = net.config()
    try:
        return _dump({"format": FORMAT, "network": config})
    except (TypeError, ValueError, RecursionError) as error:  # of a layer of the user's own
        raise TypeError(
            "[save] config() of a layer of your own: expected finite numbers, texts, lists and dicts, "
            f"got: {error}; float(x) and x.tolist() make plain ones of NumPy's"
        ) from error


def load(path: Path, device: str = "cpu") -> Sequential:
    """Read a network that `save` wrote, to a device; no code in the file is run, whoever made it.

    Of the checkpoint of a `fit`, the network as of the last epoch in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a file that is truncated, damaged, or not a network, or no such device.

    Example:
        >>> load("net.onnx")
        Traceback (most recent call last):
        ValueError: [load] file name 'net.onnx': expected the suffix .safetensors, got '.onnx'
    """
    return load_with_metadata(path, device)[0]


def load_with_metadata(path: Path, device: str = "cpu") -> tuple[Sequential, dict[str, str]]:
    """Read a network and the `extra` texts saved with it; raises as `load` does."""
    from .model import Sequential  # model's save() imports this module: a cycle, cut here

    require_suffix("load", path)
    device = devices.resolve("load", device)
    arrays, metadata, checked = _read(path)
    if ARCHITECTURE not in metadata:
        known = f"arrays only ({', '.join(list(arrays)[:4]) or 'none'})"
        raise _bad(path, "network", f"an architecture under the key {ARCHITECTURE!r}", known,
                   "read_safetensors and net.load_state_dict take plain weights")  # fmt: skip
    if not checked:
        raise _bad(
            path, "checksum", f"the key {CHECKSUM!r} beside the architecture", "none", "the file was changed"
        )
    if metadata.pop(RUN, None) is not None:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("run.")}
    config = _architecture(path, metadata.pop(ARCHITECTURE))
    _check_sizes(path, config, arrays)
    try:
        net = Sequential.from_config(config, device)
        net.load_state_dict(arrays)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise _bad(path, "network", "layers and weights that fit together", str(error)) from error
    return net, metadata


def _architecture(path: Path, text: str) -> dict[str, Any]:
    document = parse_json(path, text, "architecture", floats=True)
    version = document.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise _bad(
            path, "architecture", f"format 1 to {FORMAT}", short(version), "a newer chainrule may read it"
        )
    config = document.get("network")
    if not isinstance(config, dict):
        raise _bad(path, "architecture", "a description under 'network'", type(config).__name__)
    return config


def _check_sizes(path: Path, config: dict[str, Any], arrays: Arrays) -> None:
    """Refuse a little JSON that asks for terabytes: the widths must be those of arrays really in the file."""
    layers = config.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise _bad(path, "architecture", "a list of layers", type(layers).__name__)
    for index, layer in enumerate(layers):
        if layer.get("class") != "Linear":
            continue  # the only built-in layer whose size the file decides
        expected = (layer.get("out_features"), layer.get("in_features"))
        weight = arrays.get(f"{index}.weight")
        if weight is None or weight.shape != expected:
            found = "none" if weight is None else str(weight.shape)
            raise _bad(
                path, f"tensor '{index}.weight'", f"shape {short(expected)} from the architecture", found
            )


# ------------------------------------------------------------ arrays: writing


def write_safetensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named arrays and texts as one safetensors file with a checksum; equal content gives equal bytes.

    Raises:
        ValueError: another suffix, a reserved name, or a dtype the format lacks.
        TypeError: a name or text that is no `str`, a value that is no array.
        OSError: the disk says no; what was there before is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(f"{folder}/a.safetensors", {"a": np.arange(3)}, {"unit": "m"})
        ...     read_safetensors(f"{folder}/a.safetensors")
        ({'a': array([0, 1, 2])}, {'unit': 'm'})
    """
    require_suffix("save", path)
    texts = _texts(metadata or {})
    if CHECKSUM in texts:
        raise ValueError(f"[save] metadata: expected your own keys, got {CHECKSUM!r}, the checksum's")
    data = {name: _little_endian(name, array) for name, array in arrays.items()}
    order = sorted(data, key=lambda name: (-data[name].itemsize, name))  # widest first: all stay aligned
    blank = _header(data, order, {**texts, CHECKSUM: _BLANK.decode()})
    digest = hashlib.sha256(blank)
    for name in order:
        digest.update(_bytes(data[name]))
    header = _header(data, order, {**texts, CHECKSUM: digest.hexdigest()})
    write_atomically(path, (header, *(_bytes(data[name]) for name in order)))


def _texts(given: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise TypeError(f"[save] metadata must be a dict: expected {{name: text}}, got {short(given)}")
    for key, text in given.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"[save] metadata {short(key)}: expected text, got {type(text).__name__}")
    return dict(given)


def _little_endian(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if not isinstance(name, str) or not isinstance(array, np.ndarray):
        raise TypeError(f"[save] tensor {short(name)}: expected a NumPy array, got {type(array).__name__}")
    if name == "__metadata__":
        raise ValueError("[save] tensor '__metadata__': expected another name, got the format's own")
    dtype = array.dtype.newbyteorder("<")
    if dtype.str not in _NAMES:
        raise ValueError(
            f"[save] tensor {short(name)}: expected one of {', '.join(_DTYPES)}, got {array.dtype}"
        )
    return np.asarray(array, dtype=dtype, order="C")


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _header(data: Arrays, order: list[str], metadata: dict[str, str]) -> bytes:
    """The eight length bytes and the JSON, padded with spaces so that the data begin at a multiple of 8."""
    tensors: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name in order:
        array = data[name]
        end = begin + array.nbytes
        tensors[name] = {
            "dtype": _NAMES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    try:
        text = _dump(tensors).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"[save] names and metadata: expected valid Unicode, got {short(error.object)}"
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"[save] header: expected at most {MAX_HEADER} bytes, got {len(text)}; shorten the metadata"
        )
    return len(text).to_bytes(8, "little") + text


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """A reader sees the old file or the new one, at every moment, through every crash."""
    target = os.path.realpath(path)  # a link keeps pointing where it did, and its target is replaced
    temporary = _beside(target) + secrets.token_hex(8) + ".tmp"
    mode = _mode(target)
    create = 0o666 if mode is None else mode & 0o777
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, create)) as file:
            if mode is not None:
                os.chmod(temporary, mode)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:  # Ctrl-C as well: never leave half a file behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # A name that nobody knows, or none: write gives none.
        if isinstance(error, OSError) and error.errno and error.filename in (temporary, None):
            error.filename = os.fspath(path)
        raise
    _sync_folder(os.path.dirname(target))


def _beside(target: str) -> str:
    """What the names of a file's temporary ones begin with, and those of no other file's."""
    folder, name = os.path.split(target)
    if len(os.fsencode(name)) > 200:  # 255 bytes are the most, of which we take 22
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, f".{name}.")


def remove_leftovers(path: Path) -> None:
    """Temporary files of processes that were killed while they wrote this file; nobody else writes it now."""
    target = os.path.realpath(path)
    for name in glob.glob(glob.escape(_beside(target)) + "[0-9a-f]" * 16 + ".tmp"):
        with contextlib.suppress(OSError):
            os.unlink(name)


def _mode(target: str) -> int | None:
    """The permissions to keep; None for those of a new file, and where permissions are not POSIX's."""
    if os.name != "posix":
        return None
    try:
        return stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        return None


def _sync_folder(folder: str) -> None:
    """Make the rename itself durable; only POSIX can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------ arrays: reading


def read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read any safetensors file: its arrays by name, and its metadata; a checksum, if any, is verified.

    Duplicate keys, unknown fields and dtypes, holes, overlaps and trailing bytes are refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, or a file that is not as it must be; the message names file and tensor.
    """
    require_suffix("load", path)
    arrays, metadata, _ = _read(path)
    return arrays, metadata


def _read(path: Path) -> tuple[Arrays, dict[str, str], bool]:
    """Arrays, metadata without the checksum, and whether there was a checksum to verify."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would block for ever
        raise _bad(path, "file", "a regular file", "a folder, pipe or device")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(path, file, size)
        entries, metadata = _entries(path, header, size - 8 - len(header))
        stated = metadata.pop(CHECKSUM, None)
        digest = hashlib.sha256(len(header).to_bytes(8, "little"))
        digest.update(_without_checksum(path, header, stated))
        arrays = dict(_read_arrays(path, file, entries, digest))
    if stated is not None and stated != digest.hexdigest():
        raise _bad(
            path, "checksum", f"SHA-256 {stated[:12]}…", f"{digest.hexdigest()[:12]}…", "the file is damaged"
        )
    return arrays, metadata, stated is not None


def _read_header(path: Path, file: BufferedReader, size: int) -> bytes:
    if size < 8:
        raise _bad(path, "file", "at least 8 bytes", str(size), "it is truncated or no model file")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise _bad(
            path, "header", f"at most {MAX_HEADER} bytes", str(length), "it is damaged or no model file"
        )
    if length > size - 8:
        raise _bad(path, "header", f"{length} bytes", f"only {size - 8} in the file", "it is truncated")
    header = file.read(length)
    if len(header) != length:
        raise _bad(path, "header", f"{length} bytes", str(len(header)), "the file was changed meanwhile")
    return header


def _without_checksum(path: Path, header: bytes, stated: str | None) -> bytes:
    if stated is None:
        return header
    if len(stated) != 64 or header.count(stated.encode()) != 1:
        raise _bad(path, "checksum", "64 hexadecimal digits, once", short(stated), "the file is damaged")
    return header.replace(stated.encode(), _BLANK)


Entry = tuple[int, int, str, str, tuple[int, ...]]  # begin, end, name, NumPy dtype, shape: sorts by place


def _entries(path: Path, header: bytes, size: int) -> tuple[list[Entry], dict[str, str]]:
    """What the header promises, proven to tile the `size` bytes of data exactly, in their order."""
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(
            path, "header", "UTF-8 text", f"byte {error.start} that is none", "the file is damaged"
        ) from error
    document = parse_json(path, text, "header", floats=False)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "metadata", "texts under text keys", "something else")
    entries = sorted(_entry(path, name, fields) for name, fields in document.items())
    place = 0
    for begin, end, name, _, _ in entries:
        if begin != place:
            what = "a hole" if begin > place else "an overlap"
            raise _bad(path, f"tensor {short(name)}", f"data from byte {place}", f"{begin}: {what}")
        place = end
    if place != size:
        why = "the file is truncated" if place > size else "bytes follow"
        raise _bad(path, "data", f"{place} bytes", str(size), why)
    return entries, metadata


def _entry(path: Path, name: str, fields: Any) -> Entry:
    tensor = f"tensor {short(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, tensor, "the fields dtype, shape and data_offsets", short(fields))
    shape, offsets, dtype = fields["shape"], fields["data_offsets"], fields["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(path, tensor, f"a dtype among {', '.join(_DTYPES)}", short(dtype))
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise _bad(path, tensor, f"a shape of at most {MAX_DIMENSIONS} sizes", short(shape))
    if not _naturals(offsets) or len(offsets) != 2:
        raise _bad(path, tensor, "two data_offsets", short(offsets))
    begin, end = offsets
    nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if end - begin != nbytes:
        raise _bad(path, tensor, f"{nbytes} bytes for {dtype} {tuple(shape)}", str(end - begin))
    return begin, end, name, _DTYPES[dtype], tuple(shape)


def _read_arrays(
    path: Path, file: BufferedReader, entries: list[Entry], digest: Any
) -> Iterator[tuple[str, NDArray[Any]]]:
    for _, _, name, dtype, shape in entries:
        array = np.empty(shape, dtype)
        raw = array.reshape(-1).view(np.uint8)
        if file.readinto(raw.data) != raw.size:
            raise _bad(
                path, f"tensor {short(name)}", f"{raw.size} bytes", "fewer", "the file was changed meanwhile"
            )
        digest.update(raw.data)
        if dtype == "|b1" and raw.size and raw.max() > 1:  # NumPy's behaviour on other bytes is undefined
            raise _bad(path, f"tensor {short(name)}", "BOOL bytes 0 or 1", str(raw.max()))
        yield name, array.astype(array.dtype.newbyteorder("="), copy=False)


# ------------------------------------------------------------ JSON and messages


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_json(path: Path, text: str, what: str, *, floats: bool) -> dict[str, Any]:
    """Strict JSON: an object without duplicate keys, NaN, numbers of absurd length or absurd depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key that occurs twice")
        return found

    def short_int(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError("a number of more than 20 digits")
        return int(digits)

    def real(digits: str) -> float:
        if not floats or not math.isfinite(float(digits)):
            raise ValueError(f"the number {digits[:20]}")
        return float(digits)

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_int=short_int, parse_float=real, parse_constant=real
        )
    except (ValueError, RecursionError) as error:  # deep nesting ends in RecursionError, never in a crash
        reason = "a nesting too deep" if isinstance(error, RecursionError) else str(error)
        raise _bad(path, what, "strict JSON", reason, "the file is damaged or no model file") from error
    if not isinstance(value, dict):
        raise _bad(path, what, "a JSON object", type(value).__name__)
    return value


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _bad(path: Path, rule: str, expected: str, got: str, hint: str = "") -> ValueError:
    tail = f"; {hint}" if hint else ""
    return ValueError(f"[load] {rule} of {os.fspath(path)!r}: expected {expected}, got {got}{tail}")


def require_suffix(operation: str, path: Path, *known: str) -> str:
    """The suffix of a file's name, in lower case; one of `known`, or `.safetensors` where none are named."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"[{operation}] file name must be a path: expected text or a Path, got {short(path)}")
    path, known = os.fsdecode(path), known or (SUFFIX,)
    if "\0" in path:
        raise ValueError(f"[{operation}] file name must be one: expected no NUL, got {short(path)}")
    suffix = os.path.splitext(path)[1]
    if suffix.lower() not in known:
        expected, got = " or ".join(known), repr(suffix) if suffix else "none"
        raise ValueError(f"[{operation}] file name {path!r}: expected the suffix {expected}, got {got}")
    return suffix.lower()


def require_place(rule: str, path: str) -> None:
    """That a file can be put there, before the work whose result it is to hold."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{rule}: expected a folder that exists, got {folder!r}; make it first")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{rule}: expected the name of a file, got the folder {path!r}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{rule}: expected a folder to write to, got {folder!r}, which is read-only")
    if os.name != "posix" and os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(f"{rule}: expected a file to write to, got {path!r}, which is read-only")
