# SPDX-License-Identifier: MIT
"""Model files: what is written comes back bit for bit, and nothing else is ever accepted."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import chainrule as cr
from chainrule import io
from conftest import posix

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def example_arrays():
    """Every dtype and rank, empty arrays included."""
    values = np.random.default_rng(0)
    arrays = {f"a.{dtype}": values.integers(0, 2, (3, 5)).astype(dtype) for dtype in DTYPES}
    arrays |= {
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
        "cube": values.random((2, 3, 4)),
    }
    return arrays


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)


def file_with(path, header, data=b""):
    """A safetensors file around any header: bytes, text, or something to write as JSON."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


# ------------------------------------------------------------ arrays


def test_arrays_come_back_bit_for_bit(tmp_path):
    arrays = example_arrays()
    io.write_safetensors(tmp_path / "a.safetensors", arrays, {"note": "Δ", "": "empty key"})
    got, metadata = io.read_safetensors(tmp_path / "a.safetensors")
    assert_same(got, arrays)
    assert metadata == {"note": "Δ", "": "empty key"}


def test_any_layout_is_written_row_major_and_little_endian(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    odd = {"fortran": np.asfortranarray(x), "reversed": x[::-1, ::-2], "big": x.astype(">f8")}
    io.write_safetensors(tmp_path / "a.safetensors", odd)
    got, _ = io.read_safetensors(tmp_path / "a.safetensors")
    assert_same(got, {"fortran": x, "reversed": x[::-1, ::-2].copy(), "big": x})


def test_loaded_arrays_are_aligned_writable_and_their_own(tmp_path):
    io.write_safetensors(tmp_path / "a.safetensors", example_arrays())
    for array in io.read_safetensors(tmp_path / "a.safetensors")[0].values():
        assert array.flags.writeable and array.flags.aligned and array.flags.c_contiguous


def test_equal_content_gives_equal_bytes(tmp_path):
    arrays = example_arrays()
    backwards = dict(reversed(arrays.items()))
    io.write_safetensors(tmp_path / "a.safetensors", arrays, {"x": "1", "y": "2"})
    io.write_safetensors(tmp_path / "b.safetensors", backwards, {"y": "2", "x": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_safetensors_package_reads_our_files_and_we_read_its(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = example_arrays()
    io.write_safetensors(tmp_path / "ours.safetensors", arrays, {"note": "x"})
    assert_same(safetensors.load_file(tmp_path / "ours.safetensors"), arrays)
    safetensors.save_file(arrays, tmp_path / "theirs.safetensors", {"note": "x"})
    got, metadata = io.read_safetensors(tmp_path / "theirs.safetensors")
    assert_same(got, arrays)
    assert metadata == {"note": "x"}


def test_every_array_begins_at_a_multiple_of_its_item_size(tmp_path):
    io.write_safetensors(tmp_path / "a.safetensors", example_arrays())
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, array in example_arrays().items():
        assert (8 + length + header[name]["data_offsets"][0]) % array.itemsize == 0, name


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "message"),
    [
        ({"a": [1.0]}, None, TypeError, "tensor 'a': expected a NumPy array, got list"),
        ({1: np.zeros(1)}, None, TypeError, "tensor 1"),
        ({"a": np.array([None])}, None, ValueError, "tensor 'a': expected one of F64, .*got object"),
        ({"a": np.zeros(2, complex)}, None, ValueError, "got complex128"),
        ({"a": np.array(["x"])}, None, ValueError, "tensor 'a'"),
        ({"__metadata__": np.zeros(1)}, None, ValueError, "expected another name"),
        ({}, {"a": 1}, TypeError, "metadata 'a': expected text, got int"),
        ({}, {1: "a"}, TypeError, "metadata 1"),
        ({}, {"chainrule.sha256": "0"}, ValueError, "expected your own keys"),
        ({}, {"a": "\ud800"}, ValueError, "expected valid Unicode"),
        ({}, {"a": "x" * 100_000_001}, ValueError, "at most 100000000 bytes.*shorten the metadata"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path, arrays, metadata, error, message
):
    with pytest.raises(error, match=rf"\[save\].*{message}"):
        io.write_safetensors(tmp_path / "a.safetensors", arrays, metadata)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------ hostile files


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty object, data after it": ({}, b"x", "bytes follow"),
    "trailing byte": ({"a": F32}, b"x" * 9, "bytes follow"),
    "missing byte": ({"a": F32}, b"x" * 7, "truncated"),
    "hole before": ({"a": {**F32, "data_offsets": [4, 12]}}, b"x" * 12, "a hole"),
    "hole between": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, b"x" * 20, "tensor 'b'.*a hole"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"x" * 12, "tensor 'b'.*an overlap"),
    "same bytes twice": ({"a": F32, "b": F32}, b"x" * 8, "an overlap"),
    "size against shape": ({"a": {**F32, "shape": [3]}}, b"x" * 8, "tensor 'a'.*12 bytes for F32"),
    "offsets backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, b"x" * 8, "tensor 'a'"),
    "negative offset": ({"a": {**F32, "data_offsets": [-8, 0]}}, b"", "two data_offsets"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 8, 8]}}, b"x" * 8, "two data_offsets"),
    "boolean offset": ({"a": {**F32, "data_offsets": [False, 8]}}, b"x" * 8, "two data_offsets"),
    "real offset": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8]}}', b"x" * 8, "the number 0.0"),
    "unknown dtype": ({"a": {**F32, "dtype": "F128"}}, b"x" * 8, "tensor 'a'.*a dtype among.*'F128'"),
    "dtype no text": ({"a": {**F32, "dtype": ["F32"]}}, b"x" * 8, "a dtype among"),
    "negative shape": ({"a": {**F32, "shape": [-2]}}, b"x" * 8, "a shape"),
    "shape of text": ({"a": {**F32, "shape": ["2"]}}, b"x" * 8, "a shape"),
    "shape no list": ({"a": {**F32, "shape": 2}}, b"x" * 8, "a shape"),
    "terabytes": ({"a": {**F32, "shape": [2**40], "data_offsets": [0, 2**42]}}, b"x" * 8, "truncated"),
    "overflowing shape": ({"a": {**F32, "shape": [2**63, 2**63]}}, b"x" * 8, "a shape"),
    "empty and overflowing": ({"a": {**F32, "shape": [0, 2**63, 2], "data_offsets": [0, 0]}}, b"", "a shape"),
    "33 dimensions": ({"a": {**F32, "shape": [1] * 32 + [2]}}, b"x" * 8, "a shape of at most 32"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8, "the fields dtype"),
    "unknown field": ({"a": {**F32, "code": "x"}}, b"x" * 8, "the fields dtype"),
    "tensor no object": ({"a": [1]}, b"", "the fields dtype"),
    "BOOL of 2": ({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2", "BOOL bytes"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "metadata.*texts"),
    "metadata no object": ({"__metadata__": []}, b"", "metadata.*texts"),
    "duplicate tensor": ('{"a":{},"a":{}}', b"", "a key that occurs twice"),
    "duplicate metadata": ('{"__metadata__":{"a":"1","a":"2"}}', b"", "a key that occurs twice"),
    "duplicate by escape": ('{"__metadata__":{"a":"1","\\u0061":"2"}}', b"", "a key that occurs twice"),
    "no object": ("[]", b"", "a JSON object, got list"),
    "no JSON": ("{", b"", "strict JSON"),
    "two documents": ("{}{}", b"", "strict JSON"),
    "empty header": ("", b"", "strict JSON"),
    "not a number": ('{"a": NaN}', b"", "strict JSON"),
    "infinite": ('{"a": Infinity}', b"", "strict JSON"),
    "long number": ('{"a": ' + "9" * 1_000_000 + "}", b"", "more than 20 digits"),
    "deep lists": ("[" * 100_000 + "]" * 100_000, b"", "strict JSON, got a nesting too deep"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, b"", "strict JSON, got a nesting too deep"),
    "no UTF-8": (b'{"\xff":1}', b"", "UTF-8"),
    "checksum of no digits": ({"__metadata__": {"chainrule.sha256": ""}}, b"", "64 hexadecimal digits"),
    "wrong checksum": ({"__metadata__": {"chainrule.sha256": "0" * 64}}, b"", "checksum.*damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, case):
    header, data, message = HOSTILE[case]
    path = file_with(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=r"\[load\] .*bad\.safetensors.*: expected .*, got ") as caught:
        io.read_safetensors(path)
    assert re.search(message, str(caught.value))
    assert len(str(caught.value)) < 1000  # a message, not the file's content


def test_a_header_length_is_checked_before_memory_is_asked_for(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="at most 100000000 bytes"):
        io.read_safetensors(path)
    path.write_bytes((99_000_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"only 2 in the file.*truncated"):
        io.read_safetensors(path)


def saved_network(path):
    net = cr.mlp([3, 4, 2], activation="tanh", seed=1)
    io.save(net, path, {"note": "hello"})
    return net


def test_every_cut_of_a_model_file_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    saved_network(path)
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"\[load\].*net\.safetensors"):
            cr.load(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="bytes follow"):
        cr.load(path)


def test_every_flipped_bit_of_a_model_file_is_noticed(tmp_path):
    path = tmp_path / "net.safetensors"
    saved_network(path)
    raw = path.read_bytes()
    assert len(raw) > 300
    for place in range(len(raw)):
        for bit in {place % 8, (place + 5) % 8}:
            damaged = bytearray(raw)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"\[load\].*net\.safetensors"):
                cr.load(path)


# ------------------------------------------------------------ networks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_comes_back_with_the_same_predictions_and_texts(tmp_path, dtype):
    net = cr.mlp([5, 7, 3], activation="relu", seed=3, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(11, 5)).astype(dtype)
    io.save(net, tmp_path / "net.safetensors", {"note": "hello"})
    again, extra = io.load_with_metadata(tmp_path / "net.safetensors")
    assert extra == {"note": "hello"}
    np.testing.assert_array_equal(again.predict(x), net.predict(x), strict=True)
    assert_same(again.state_dict(), net.state_dict())
    io.save(again, tmp_path / "again.safetensors", extra)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_forged_architectures_are_refused(tmp_path):
    """The checksum is right in these files: only the architecture and the arrays contradict each other."""
    net = saved_network(tmp_path / "net.safetensors")
    arrays = net.state_dict()

    def load(document):
        path = tmp_path / "forged.safetensors"
        io.write_safetensors(
            path, arrays, {"chainrule": document if isinstance(document, str) else json.dumps(document)}
        )
        return cr.load(path)

    def forged(**fields):
        config = json.loads(json.dumps(net.config()))
        config["layers"][0].update(fields)
        return {"format": 1, "network": config}

    assert load(forged()).config() == net.config()
    for document in [
        forged(in_features=2**40, out_features=2**40),
        forged(out_features=10**19),
        forged(out_features=True),
        forged(in_features="3"),
        forged(in_features=None),
        forged(**{"class": "Nonsense"}),
        {"format": 1, "network": {**net.config(), "layers": {}}},
        {"format": 1, "network": {**net.config(), "layers": [3]}},
        {"format": 1, "network": {**net.config(), "layers": []}},
        {"format": 1, "network": {**net.config(), "layers": net.config()["layers"][:1]}},
        {"format": 1, "network": {**net.config(), "dtype": "float16"}},
        {"format": 1, "network": {}},
        {"format": 1, "network": []},
        {"format": 1},
        {"format": 2, "network": net.config()},
        {"format": True, "network": net.config()},
        {"format": "1", "network": net.config()},
        [],
        "",
        '{"format": NaN}',
        '{"format": 1e999}',
        "[" * 100_000,
    ]:
        with pytest.raises(ValueError, match=r"\[load\].*forged\.safetensors"):
            load(document)


@pytest.mark.parametrize("fields", [{"in_features": 2**20}, {"out_features": 5}, {"out_features": None}])
def test_widths_are_checked_before_memory_is_asked_for(tmp_path, monkeypatch, fields):
    net = cr.mlp([3, 4, 2])
    config = net.config()
    config["layers"][0].update(fields)
    document = json.dumps({"format": 1, "network": config})
    io.write_safetensors(tmp_path / "net.safetensors", net.state_dict(), {"chainrule": document})
    monkeypatch.setattr(cr.Sequential, "from_config", lambda config: pytest.fail("it asked for memory"))
    with pytest.raises(ValueError, match=r"tensor '0\.weight' of .*expected shape .* from the architecture"):
        io.load(tmp_path / "net.safetensors")


def test_plain_weights_are_no_network(tmp_path):
    io.write_safetensors(tmp_path / "weights.safetensors", {"w": np.zeros(3)})
    with pytest.raises(ValueError, match=r"an architecture.*arrays only \(w\)"):
        cr.load(tmp_path / "weights.safetensors")


def test_an_architecture_without_checksum_is_refused(tmp_path):
    net = cr.mlp([1, 1])
    document = json.dumps({"format": 1, "network": net.config()})
    path = file_with(tmp_path / "net.safetensors", {"__metadata__": {"chainrule": document}})
    with pytest.raises(ValueError, match=r"checksum.*the file was changed"):
        cr.load(path)


@pytest.mark.parametrize("key", ["chainrule", "chainrule.run"])
def test_keys_of_our_own_are_reserved(key, tmp_path):
    with pytest.raises(ValueError, match=f"expected your own keys, got {key!r}"):
        io.save(cr.mlp([1, 1]), tmp_path / "net.safetensors", {key: "x"})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------ paths


def test_other_suffixes_are_refused(tmp_path):
    for name in ["net.pt", "net", "net.safetensors.zip"]:
        with pytest.raises(ValueError, match=r"\[save\] file name .*expected the suffix \.safetensors"):
            io.save(cr.mlp([1, 1]), tmp_path / name)
        with pytest.raises(ValueError, match=r"\[load\] file name .*expected the suffix \.safetensors"):
            cr.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        cr.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        io.save(cr.mlp([1, 1]), tmp_path / "nowhere" / "net.safetensors")


@posix
def test_folders_and_pipes_are_refused_without_waiting(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ["folder.safetensors", "pipe.safetensors"]:
        with pytest.raises(ValueError, match="expected a regular file"):
            cr.load(tmp_path / name)


@posix
def test_an_existing_file_keeps_its_permissions_and_a_new_one_follows_the_umask(tmp_path):
    path = tmp_path / "net.safetensors"
    old = os.umask(0o027)
    try:
        saved_network(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        saved_network(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(old)


@posix
def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "net.safetensors")
    saved_network(link)
    assert link.is_symlink() and (tmp_path / "real" / "net.safetensors").is_file()


@pytest.mark.parametrize("call", ["open", "fsync", "replace", pytest.param("chmod", marks=posix)])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "net.safetensors"
    saved_network(path)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise type(error)(*error.args)

    monkeypatch.setattr(io.os, call, fail)
    with pytest.raises(type(error)) as caught:
        io.save(cr.mlp([9, 9]), path)
    monkeypatch.undo()
    assert isinstance(error, KeyboardInterrupt) or caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]


@posix
def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A real limit on the file size instead of a pretended one, in a process of its own."""
    path = tmp_path / "net.safetensors"
    saved_network(path)
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, chainrule as cr\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: cr.mlp([99, 99]).save(sys.argv[1])\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"[Errno {errno.EFBIG}] File too large: {str(path)!r}\n", done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """Killed amid a loop of saves, five times: what stands there is one of the versions, unharmed."""
    path = tmp_path / "a.safetensors"
    code = (
        "import sys, numpy as np\n"
        "from chainrule.io import write_safetensors\n"
        "k = 0\n"
        "while True:\n"
        "    write_safetensors(sys.argv[1], {'a': np.full(200_000, k)}, {'k': str(k)})\n"
        "    k += 1\n"
    )
    for attempt in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        try:
            deadline = time.monotonic() + 60
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.02 + 0.007 * attempt)
        finally:
            writer.kill()
            writer.wait()
        arrays, metadata = io.read_safetensors(path)
        assert set(arrays["a"].tolist()) == {int(metadata["k"])}
        path.unlink()


def test_a_path_may_be_text_or_a_path_object(tmp_path):
    saved_network(str(tmp_path / "net.safetensors"))
    assert (
        cr.load(Path(tmp_path / "net.safetensors")).config()
        == cr.load(str(tmp_path / "net.safetensors")).config()
    )
