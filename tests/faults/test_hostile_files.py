"""Hostile and damaged files are refused by our own parser, before safetensors or transformers sees them."""

import json
import os
import shutil

import pytest

from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.safety import check_name, read_header, read_json, refuse_remote_code
from moekit.errors import BadCheckpoint, UnsafeInput, UnsupportedModel
from tests.checkpoints import edit_json, plain, saved, write_header, write_raw

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def at(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_a_proper_file_is_read(file):
    write_header(file, {"__metadata__": {"format": "pt"}, "b": at(8, 12, (2,), "BF16"), "a": F32}, bytes(12))
    header = read_header(file)
    assert list(header.tensors) == ["a", "b"]  # in file order
    start = file.stat().st_size - 12
    assert header.tensors["b"].offsets == (start + 8, start + 12)
    assert header.tensors["b"].shape == (2,)
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_claimed_header_length_is_never_allocated(file, length):
    write_raw(file, b"{}", length=length)
    with pytest.raises(UnsafeInput, match=str(length)):
        read_header(file)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_too_short_for_any_header(file, size):
    file.write_bytes(bytes(size))
    with pytest.raises(BadCheckpoint, match="truncated"):
        read_header(file)


def test_header_longer_than_the_file(file):
    write_raw(file, b"{}", length=1000)
    with pytest.raises(BadCheckpoint, match="truncated"):
        read_header(file)


def test_truncated_shard_names_both_sizes(file):
    write_header(file, {"a": F32, "b": at(8, 16)}, bytes(11))
    with pytest.raises(BadCheckpoint, match=r"truncated: the header describes \d+ bytes, the file has \d+") as caught:
        read_header(file)
    assert caught.value.file == str(file)


BAD_HEADERS = {
    "overlap": {"a": F32, "b": at(4, 12)},
    "the same bytes twice": {"a": F32, "b": F32},
    "hole": {"a": F32, "b": at(12, 20)},
    "hole at the start": {"a": at(4, 12)},
    "backwards": {"a": at(8, 0)},
    "negative": {"a": at(-8, 0)},
    "past 2^63": {"a": at(0, 2**64, (2**62,))},
    "span contradicts shape": {"a": at(0, 8, (3,))},
    "overflowing shape": {"a": at(0, 8, (2**62, 2**62))},
    "negative size": {"a": at(0, 8, (-2,))},
    "boolean size": {"a": at(0, 4, (True,))},
    "unknown dtype": {"a": at(0, 8, (2,), "F33")},
    "dtype no string": {"a": at(0, 8, (2,), ["F32"])},
    "offsets no pair": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
    "surplus field": {"a": {**F32, "code": "x"}},
    "missing field": {"a": {"dtype": "F32", "shape": [2]}},
    "entry no object": {"a": [1]},
    "hundred dimensions": {"a": at(0, 4, (1,) * 100)},
    "metadata no strings": {"__metadata__": {"a": 1}, "a": F32},
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_headers_that_lie(file, case):
    write_header(file, BAD_HEADERS[case], bytes(16))
    with pytest.raises(UnsafeInput):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b" {}",
        b'{"a": NaN}',
        b"{\xff}",
        b'{"a":',
        b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}",
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "list", "space", "nan", "utf8", "cut", "key-twice", "field-twice", "deep", "deeper", "big-int"],
)
def test_headers_that_are_no_proper_json(file, header):
    write_raw(file, header, bytes(8))
    with pytest.raises(UnsafeInput):
        read_header(file)


def test_bytes_after_the_last_tensor(file):
    write_header(file, {"a": F32}, bytes(8) + b"MZ smuggled")
    with pytest.raises(UnsafeInput, match="belong to nothing"):
        read_header(file)


@pytest.mark.parametrize("name", ["../x.safetensors", "a/../../x", "/etc/passwd", "", "a\\..\\b", "a\0b", ".."])
def test_names_that_leave_the_folder(tmp_path, name):
    with pytest.raises(UnsafeInput):
        check_name(tmp_path, name)


def test_link_out_of_the_folder(tmp_path):
    model, outside = tmp_path / "model", tmp_path / "secret.safetensors"
    model.mkdir()
    outside.write_bytes(b"x")
    (model / "a.safetensors").symlink_to(outside)
    (model / "deep").symlink_to(tmp_path)
    for name in ("a.safetensors", "deep/secret.safetensors"):
        with pytest.raises(UnsafeInput, match="link"):
            check_name(model, name)


def test_links_into_the_hub_caches_own_blobs_stay_legal(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    plain(snapshot, "mixtral")
    blobs.mkdir()
    for entry in list(snapshot.iterdir()):
        shutil.move(entry, blobs / f"blob-{entry.name}")
        entry.symlink_to(f"../../blobs/blob-{entry.name}")
    verify(Checkpoint.open(snapshot))
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.move(blobs / "blob-model.safetensors", other / "blob")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "blob")
    with pytest.raises(UnsafeInput, match="link"):
        Checkpoint.open(snapshot)


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UnsafeInput, match="regular file"):
        check_name(tmp_path, "model.safetensors")


@pytest.fixture
def sharded(tmp_path):
    folder = saved(tmp_path / "model", "mixtral", max_shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _redirect(folder, to):
    def change(index):
        first = min(index["weight_map"])
        index["weight_map"][first] = to

    edit_json(folder / "model.safetensors.index.json", change)


@pytest.mark.parametrize("to", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/../../outside.safetensors"])
def test_index_that_points_out_of_the_folder(sharded, to):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    _redirect(sharded, to)
    with pytest.raises(UnsafeInput, match="out of the folder"):
        Checkpoint.open(sharded)


def test_index_that_names_missing_shards_lists_all(sharded):
    removed = sorted(sharded.glob("*.safetensors"))[:2]
    for path in removed:
        path.unlink()
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(sharded)
    assert all(path.name in str(caught.value) for path in removed)
    assert caught.value.exit_code == 2


def test_index_with_a_key_twice(sharded):
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    line = next(line for line in text.splitlines() if "lm_head" in line)
    index.write_text(text.replace(line, line.rstrip(",") + ",\n" + line))
    with pytest.raises(BadCheckpoint, match=r"twice.*lm_head"):
        Checkpoint.open(sharded)


def test_truncated_shard_of_a_real_model(sharded):
    shard = max(sharded.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(BadCheckpoint, match="truncated") as caught:
        Checkpoint.open(sharded)
    assert shard.name in str(caught.value)


def test_a_tensor_in_two_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(BadCheckpoint, match="in two shards"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth"])
def test_pickles_only(tmp_path, name):
    folder = plain(tmp_path / "model", "mixtral")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsafeInput, match="pickles") as caught:
        Checkpoint.open(folder)
    assert name in str(caught.value)
    assert "safetensors" in caught.value.hint
    assert caught.value.exit_code == 3


def test_pickles_beside_safetensors_are_just_ignored(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    verify(Checkpoint.open(folder))


def test_no_weights_at_all(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="no weights"):
        Checkpoint.open(folder)


REMOTE = {"model_type": "made_up_moe", "auto_map": {"AutoModelForCausalLM": "modeling_made_up.MadeUp"}}


def test_remote_code_needs_flag_and_pin(tmp_path):
    with pytest.raises(UnsupportedModel, match="code from its repository"):
        refuse_remote_code(REMOTE)
    with pytest.raises(UnsupportedModel, match="pinned"):
        refuse_remote_code(REMOTE, allow=True, revision="main")
    refuse_remote_code(REMOTE, allow=True, revision="a" * 40)
    refuse_remote_code(REMOTE, allow=True, file=tmp_path)  # code that lies in a local folder is pinned by nature
    elsewhere = {**REMOTE, "auto_map": {"AutoModelForCausalLM": "org/repo--modeling.MadeUp"}}
    with pytest.raises(UnsupportedModel, match="pinned"):
        refuse_remote_code(elsewhere, allow=True, file=tmp_path)


def test_remote_code_of_a_folder_is_not_run(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    edit_json(folder / "config.json", lambda config: config.update(REMOTE))
    (folder / "modeling_made_up.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(UnsupportedModel):
        Checkpoint.open(folder)
    assert not (tmp_path / "owned").exists()


def test_native_models_that_also_name_remote_code_are_fine(tmp_path):
    folder = plain(tmp_path / "model", "deepseek_v3")
    edit_json(folder / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_deepseek.X"}))
    verify(Checkpoint.open(folder))


def test_unknown_model_type(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    edit_json(folder / "config.json", lambda config: config.update(model_type="never_heard_of"))
    with pytest.raises(UnsupportedModel, match="never_heard_of"):
        Checkpoint.open(folder)


def test_an_adapter_is_no_model(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    with pytest.raises(UnsupportedModel, match="adapter"):
        Checkpoint.open(folder)


def test_json_caps(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(UnsafeInput, match="at most 50"):
        read_json(path, limit=50)
    path.write_text('{"a":' * 40 + "1" + "}" * 40)
    with pytest.raises(UnsafeInput, match="nested"):
        read_json(path)
    path.write_text("[" * 1_000_000)
    with pytest.raises(UnsafeInput, match="nested"):
        read_json(path)
    for text in ("[]", "{", '{"a":1,"a":2}'):
        path.write_text(text)
        with pytest.raises(BadCheckpoint):
            read_json(path)


def test_config_that_claims_a_billion_layers_or_experts(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    for key in ("num_hidden_layers", "num_local_experts"):
        twin = shutil.copytree(folder, tmp_path / key)
        edit_json(twin / "config.json", lambda config, key=key: config.update({key: 10**9}))
        with pytest.raises(BadCheckpoint, match=key):
            verify(Checkpoint.open(twin))
