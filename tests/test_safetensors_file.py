"""Reading and writing safetensors files: in agreement with the ``safetensors`` library, and trusting nothing.

What a bad file claims is refused when it is opened, before anything of the claimed size is allocated: every
refusal here comes from the constructor, which reads no more than the header, and names the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from families import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.checkpoint.directory import ModelDirectory, read_json
from espalier.checkpoint.safetensors_file import (
    DTYPES,
    SafetensorsFile,
    SafetensorsWriter,
    dtype_name,
    read_safetensors,
    torch_dtype,
    write_safetensors,
)
from espalier.errors import EspalierError

SHAPES = [(), (1,), (0,), (3,), (2, 3), (0, 4), (2, 0, 3), (1, 1, 1, 1), (5, 1, 2)]


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose bytes are all kinds of bytes (NaNs and subnormals too)."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    raw = (torch.arange(count * dtype.itemsize) * 37 + 11).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


def every_kind() -> dict[str, torch.Tensor]:
    return {f"{name}.{'x'.join(map(str, shape))}": sample(torch_dtype(name), shape) for name in DTYPES for shape in SHAPES}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte agree."""

    def flat(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat(a), flat(b))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_kind()
    write_safetensors(tmp_path / "ours.safetensors", tensors, {"note": "ü"})
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = every_kind()
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"note": "ü"})
    found = read_safetensors(tmp_path / "theirs.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    with SafetensorsFile(tmp_path / "theirs.safetensors") as file:
        assert file.metadata == {"note": "ü"}


def test_a_file_without_tensors_reads_as_empty_both_ways(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours.safetensors", {})
    assert safetensors.torch.load_file(tmp_path / "ours.safetensors") == {}
    safetensors.torch.save_file({}, tmp_path / "theirs.safetensors")
    assert read_safetensors(tmp_path / "theirs.safetensors") == {}


def test_a_transposed_tensor_is_stored_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_safetensors(tmp_path / "t.safetensors", {"a": tensor})
    assert torch.equal(read_safetensors(tmp_path / "t.safetensors")["a"], tensor)


def test_what_is_read_is_fresh_memory(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t.safetensors", {"a": torch.ones(3)})
    with SafetensorsFile(tmp_path / "t.safetensors") as file:
        file.read("a").zero_()
        assert file.read("a").tolist() == [1, 1, 1]


def test_a_file_that_is_open_when_the_interpreter_ends_is_closed_without_a_word(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    script = (
        "import transformers, espalier; espalier.load\nfrom pathlib import Path\nfrom espalier.checkpoint.safetensors_file import SafetensorsFile\n"
        "file = SafetensorsFile(Path('x.safetensors'))\ndef keep(): return file\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr


def test_bytes_come_in_pieces_that_make_the_tensor(tmp_path: Path) -> None:
    tensor = sample(torch.int16, (9_000_000,))  # 18 MB, larger than one piece
    write_safetensors(tmp_path / "t.safetensors", {"a": torch.zeros(1), "b": tensor})
    pieces: list[bytes] = []
    with SafetensorsFile(tmp_path / "t.safetensors") as file:
        file.read_bytes("b", lambda piece: pieces.append(bytes(piece)))
    assert len(pieces) == 2
    assert b"".join(pieces) == tensor.numpy().tobytes()


def test_dtypes_that_the_format_lacks_are_refused() -> None:
    with pytest.raises(EspalierError, match="complex64"):
        dtype_name(torch.complex64)


# the writer


def test_tensors_may_be_written_in_any_order(tmp_path: Path) -> None:
    layout = {"a": ("F32", (2,)), "b": ("I64", (1,)), "c": ("U8", (3,))}
    writer = SafetensorsWriter(tmp_path / "t.safetensors", layout)
    writer.write("c", torch.tensor([1, 2, 3], dtype=torch.uint8))
    writer.write("a", torch.tensor([1.0, 2.0]))
    writer.write("b", torch.tensor([7]))
    writer.close()
    found = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert {name: t.tolist() for name, t in found.items()} == {"a": [1, 2], "b": [7], "c": [1, 2, 3]}
    assert writer.nbytes == (tmp_path / "t.safetensors").stat().st_size


def test_data_begin_aligned_and_the_largest_elements_come_first(tmp_path: Path) -> None:
    """As the library lays them out, so that a map of the file has every tensor aligned."""
    write_safetensors(tmp_path / "t.safetensors", every_kind())
    with SafetensorsFile(tmp_path / "t.safetensors") as file:
        assert all(info.start % DTYPES[info.dtype][1] == 0 for info in file.tensors.values())


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(2, 1), torch.zeros(()), torch.zeros(2, dtype=torch.int32)],
    ids=["dtype", "size", "dimensions", "scalar", "same bytes"],
)
def test_the_writer_refuses_another_dtype_or_shape_than_declared(wrong: torch.Tensor, tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "t.safetensors", {"a": ("F32", (2,))})
    with pytest.raises(ValueError, match="a: declared F32"):
        writer.write("a", wrong)


def test_the_writer_refuses_to_finish_without_every_tensor(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "t.safetensors", {"a": ("F32", (2,)), "b": ("F32", (3,)), "c": ("F32", (0,))})
    writer.write("a", torch.zeros(2))
    writer.write_bytes("b", b"12345678", 4)
    writer.close()
    with pytest.raises(ValueError, match=r"never written.*'b'"):
        writer.require_complete()


def test_parts_of_a_tensor_may_be_written_in_any_order_and_stay_inside_it(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "t.safetensors", {"a": ("U8", (5,)), "b": ("U8", (2,))})
    writer.write_bytes("a", b"cde", 2)
    with pytest.raises(ValueError, match="do not belong"):
        writer.write_bytes("a", b"xy", 4)
    writer.write_bytes("b", b"fg")
    writer.write_bytes("a", b"ab")
    writer.close()
    writer.require_complete()
    found = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert bytes(found["a"].tolist()) == b"abcde" and bytes(found["b"].tolist()) == b"fg"


def test_the_writer_refuses_a_tensor_twice_or_undeclared(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "t.safetensors", {"a": ("F32", (2,))})
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="written twice"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(KeyError):
        writer.write("b", torch.zeros(2))


# bad files


def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(start: int, stop: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


HUGE = 2**61
BAD: dict[str, bytes] = {
    "no bytes": b"",
    "less than a length": b"\x01\0\0\0",
    "a length beyond the file": build({"a": entry(0, 4)}, bytes(4), length=4096),
    "the largest length": b"\xff" * 8 + b"{}",
    "an empty header": build(b""),
    "a header that is no JSON": build(b"not json"),
    "a header cut short": build(b'{"a": {"dtype"'),
    "a header that is no UTF-8": build(b'{"\xff\xfe": 1}'),
    "a header in UTF-16": build(json.dumps({"a": entry(0, 4)}).encode("utf-16"), bytes(4)),
    "a header that is a list": build([1, 2]),
    "a header that is a number": build(b"3"),
    "a header nested without end": build(b"[" * 100_000),
    "a number with too many digits": build(b'{"a": ' + b"9" * 10_000 + b"}"),
    "an entry that is a list": build({"a": [0, 4]}),
    "an entry without offsets": build({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "an unknown dtype": build({"a": entry(0, 4, dtype="F31")}, bytes(4)),
    "a dtype that is a list": build({"a": entry(0, 4, dtype=["F32"])}, bytes(4)),
    "a dtype that is null": build({"a": {"dtype": None, "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a shape that is a number": build({"a": entry(0, 4, shape=1)}, bytes(4)),
    "a shape of strings": build({"a": entry(0, 4, shape=["1"])}, bytes(4)),
    "a shape of fractions": build({"a": entry(0, 4, shape=[1.0])}, bytes(4)),
    "a shape of truths": build({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "a negative size": build({"a": entry(0, 4, shape=[-1, -1])}, bytes(4)),
    "a huge shape": build({"a": entry(0, 4, shape=[HUGE, HUGE])}, bytes(4)),
    "a shape whose size wraps to the right one": build({"a": entry(0, 4, shape=[2**62 + 1])}, bytes(4)),
    "a huge shape and offsets": build({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(4)),
    "a huge empty shape": build({"a": entry(0, 0, shape=[0, HUGE, HUGE])}),
    "more dimensions than a tensor has": build({"a": entry(0, 4, shape=[1] * 100_000)}, bytes(4)),
    "three offsets": build({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "offsets in reverse": build({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "negative offsets": build({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)),
    "offsets that disagree with the shape": build({"a": entry(0, 8, shape=[1])}, bytes(8)),
    "offsets beyond the file": build({"a": entry(0, 8)}, bytes(4)),
    "tensors that overlap": build({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "two tensors in one place": build({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "a hole between tensors": build({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a hole before the first": build({"a": entry(4, 8)}, bytes(8)),
    "bytes after the last": build({"a": entry(0, 4)}, bytes(5)),
    "no tensors but bytes": build({}, bytes(4)),
    "a name twice": build(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
    "a field twice": build(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "a name that is no text": build(b'{"\\ud800": %s}' % json.dumps(entry(0, 4)).encode(), bytes(4)),
    "a name of half a character": build(b'{"\xed\xa0\x80": %s}' % json.dumps(entry(0, 4)).encode(), bytes(4)),
    "metadata of numbers": build({"__metadata__": {"a": 1}}),
    "metadata that is a list": build({"__metadata__": ["a"]}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_is_refused_that_has(what: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[what])
    with pytest.raises(EspalierError, match=r"bad\.safetensors"):
        SafetensorsFile(path)


def test_a_missing_file_a_folder_and_an_impossible_name_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "a\0b.safetensors"):
        with pytest.raises(EspalierError, match=r"cannot be read"):
            SafetensorsFile(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(EspalierError, match=r"model\.safetensors cannot be read: it is no regular file"):
        SafetensorsFile(tmp_path / "model.safetensors")
    with pytest.raises(EspalierError, match=r"config\.json cannot be read: it is no regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("text", ['{"a": 1, "b": {"c": 1, "c": 2}}', r'{"\ud800": 1}'])
def test_json_that_names_something_twice_or_is_no_text_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EspalierError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)})
    with SafetensorsFile(tmp_path / "t.safetensors") as file, pytest.raises(EspalierError, match="no tensor 'b'"):
        file.read("b")


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "empty": torch.zeros(0), "b": torch.arange(3, dtype=torch.uint8)}
    write_safetensors(tmp_path / "whole.safetensors", tensors)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(EspalierError, match=r"cut\.safetensors"):
            SafetensorsFile(path)
    path.write_bytes(whole)
    assert read_safetensors(path).keys() == tensors.keys()


def test_a_file_cut_while_it_is_open_is_refused_at_the_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"a": torch.zeros(100)})
    with SafetensorsFile(path) as file:
        with path.open("r+b") as raw:
            raw.truncate(200)
        with pytest.raises(EspalierError, match="ended while tensor 'a'"):
            file.read("a")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["F32", "I64", 2**63, -1, 1e400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)) | json_values,
        "shape": st.lists(st.integers(0, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values,
    }
)
fuzzed = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opens_and_reads_or_refuses(path: Path, content: bytes) -> None:
    """Whatever opens also reads in whole, from no more memory than the file."""
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except EspalierError as error:
        assert path.name in str(error)
        return
    with file:
        assert sum(info.nbytes for info in file.tensors.values()) <= len(content)
        for name, info in file.tensors.items():
            tensor = file.read(name)
            assert tuple(tensor.shape) == info.shape and tensor.nbytes == info.nbytes


@fuzzed
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3), st.integers(0, 40))
def test_no_header_makes_anything_else_than_a_refusal(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    opens_and_reads_or_refuses(tmp_path / "fuzz.safetensors", build(header, bytes(size)))


@fuzzed
@given(st.data())
def test_no_damage_to_a_header_makes_anything_else_than_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(build({"a": entry(0, 8, shape=[2, 1]), "b": entry(8, 16, "I64", [])}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255) | st.sampled_from(b'0129-.eE[]{}",:'))
    opens_and_reads_or_refuses(tmp_path / "fuzz.safetensors", bytes(content))


# directories of models


def directory(folder: Path, index: Any = None, **files: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_model_over_several_files_is_read_by_name(tmp_path: Path) -> None:
    folder = directory(
        tmp_path / "m",
        {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}},
        one={"x": torch.tensor([1.0])},
        two={"y": torch.tensor([2], dtype=torch.int16)},
    )
    found = ModelDirectory(folder)
    assert sorted(found) == ["x", "y"] and "z" not in found
    assert (found.read("x").tolist(), found.read("y").tolist()) == ([1.0], [2])
    assert found.nbytes() == 6 and found.files() == ["one.safetensors", "two.safetensors"]
    with pytest.raises(EspalierError, match="no tensor 'z'"):
        found.read("z")


def test_a_transformers_checkpoint_reads_as_transformers_wrote_it(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "m", max_shard_size="20kB")
    found = ModelDirectory(tmp_path / "m")
    assert len(found.files()) > 2
    state = model.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("file", ["../one.safetensors", "sub/one.safetensors", "/etc/one.safetensors", "one.bin", "..", ""])
def test_an_index_that_names_anything_but_a_plain_file_is_refused(file: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"x": torch.zeros(1)})
    folder = directory(tmp_path / "m", {"weight_map": {"x": file}}, one={"x": torch.zeros(1)})
    with pytest.raises(EspalierError, match="must be a plain"):
        ModelDirectory(folder)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {"x": 3}}, {"weight_map": {"x": ["one.safetensors"]}}], ids=str
)
def test_an_index_of_another_shape_is_refused(index: Any, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="no weight_map"):
        ModelDirectory(directory(tmp_path / "m", index, one={"x": torch.zeros(1)}))


def test_an_index_that_names_a_missing_tensor_or_file_is_refused(tmp_path: Path) -> None:
    folder = directory(tmp_path / "m", {"weight_map": {"y": "one.safetensors"}}, one={"x": torch.zeros(1)})
    with pytest.raises(EspalierError, match=r"places 'y' in one\.safetensors"):
        ModelDirectory(folder)
    folder = directory(tmp_path / "n", {"weight_map": {"x": "two.safetensors"}}, one={"x": torch.zeros(1)})
    with pytest.raises(EspalierError, match=r"two\.safetensors cannot be read"):
        ModelDirectory(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    folder = directory(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(EspalierError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        ModelDirectory(folder)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [break_config, list_config, remove_config])
def test_a_directory_whose_config_does_not_read_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = directory(tmp_path / "m", model={"x": torch.zeros(1)})
    ModelDirectory(folder)
    damage(folder)
    with pytest.raises(EspalierError, match=r"config\.json"):
        ModelDirectory(folder)


def test_a_directory_without_weights_and_a_path_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=r"neither model\.safetensors nor"):
        ModelDirectory(directory(tmp_path / "m"))
    with pytest.raises(EspalierError, match="not a directory"):
        ModelDirectory(tmp_path / "none")


def test_pages_that_live_until_the_end_say_nothing(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(5000)})
    script = "import builtins, sys; from pathlib import Path; from espalier.checkpoint.safetensors_file import SafetensorsFile\n"
    script += "builtins.kept = SafetensorsFile(Path(sys.argv[1])).pages('a')"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True)
    assert done.stderr == ""
