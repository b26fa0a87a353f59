"""Downloads are restricted to what a model needs; the hub is played by a local folder."""

import fnmatch
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.hub import looks_like_hub_id
from moekit.errors import BadCheckpoint, UnsafeInput
from tests.checkpoints import edit_json, plain, saved

COMMIT = "c" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub: `hub.repo` is the remote folder, `hub.asked` what was asked for."""

    class Hub:
        repo = tmp_path / "remote"
        cache = tmp_path / "models--org--name" / "snapshots" / COMMIT
        asked: list = []  # noqa: RUF012

    Hub.asked = []

    def download(repo, *, revision, token, local_files_only, allow_patterns, ignore_patterns):
        Hub.asked.append((revision, allow_patterns))
        Hub.cache.mkdir(parents=True, exist_ok=True)
        for path in sorted(p for p in Hub.repo.rglob("*") if p.is_file()):
            name = str(path.relative_to(Hub.repo))
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or []):
                (Hub.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Hub.cache / name)
        return str(Hub.cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [p.name for p in Hub.repo.iterdir()])
    return Hub


def test_only_what_a_model_needs_is_fetched(hub):
    saved(hub.repo, "olmoe", max_shard_bytes=60_000)
    for name in ("modeling.py", "pytorch_model.bin", "extra.gguf", "consolidated.safetensors", "original/x.json"):
        (hub.repo / name).parent.mkdir(exist_ok=True)
        (hub.repo / name).write_bytes(b"unwanted")
    checkpoint = Checkpoint.open("org/name", revision="main")
    verify(checkpoint)
    assert checkpoint.record is not None
    fetched = {path.name for path in hub.cache.rglob("*") if path.is_file()}
    assert fetched == {p.name for p in hub.repo.glob("*") if p.suffix in {".json", ".md"}} | set(checkpoint.shards)
    # Shards come from the commit that the small files came from, whatever the branch does meanwhile.
    assert [revision for revision, _ in hub.asked] == ["main", COMMIT]


def test_single_file_models(hub):
    plain(hub.repo, "mixtral")
    verify(Checkpoint.open("org/name"))


def test_hub_index_that_points_out(hub):
    saved(hub.repo, "olmoe", max_shard_bytes=60_000)
    edit_json(
        hub.repo / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": "../../etc/x.safetensors"}),
    )
    with pytest.raises(UnsafeInput, match="out of the folder"):
        Checkpoint.open("org/name")
    assert len(hub.asked) == 1


def test_hub_index_that_names_other_files(hub):
    saved(hub.repo, "olmoe", max_shard_bytes=60_000)
    edit_json(
        hub.repo / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": "*"}),
    )
    with pytest.raises(UnsafeInput, match="names the file"):
        Checkpoint.open("org/name")
    assert len(hub.asked) == 1


def test_pickles_on_the_hub_are_not_even_fetched(hub):
    plain(hub.repo, "mixtral")
    (hub.repo / "model.safetensors").rename(hub.repo / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match=r"pytorch_model\.bin"):
        Checkpoint.open("org/name")
    assert not list(hub.cache.glob("*.bin"))


def test_offline_is_said_plainly(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BadCheckpoint, match="cannot reach the hub") as caught:
        Checkpoint.open("org/name")
    assert "network" in caught.value.hint


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("./x", False),
        ("../x", False),
        ("/abs", False),
        ("a/b/c", False),
        ("", False),
    ],
)
def test_what_looks_like_a_hub_id(model, expected):
    assert looks_like_hub_id(model) is expected


def test_a_network_that_is_down_is_told(monkeypatch):
    # The client's own errors, with no message, are no OSError.
    client = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)

    def down(*_, **__):
        raise client("")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    with pytest.raises(BadCheckpoint, match=f"the hub does not give it: {client.__name__}"):
        Checkpoint.open("org/name")
