"""The hub for tests, as the real client finds it."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.hub import Hub

NAME = "lmsat/nano"


@pytest.fixture
def hub(backbone: Path, tmp_path: Path) -> Iterator[Hub]:
    """A model at two revisions: the earlier one with its weights halved, and a file in a folder."""
    earlier = tmp_path / "step1000"
    shutil.copytree(backbone / "model", earlier)
    weights = load_file(earlier / "model.safetensors")
    halved = {key: tensor / 2 for key, tensor in weights.items()}
    save_file(halved, earlier / "model.safetensors", metadata={"format": "pt"})
    (earlier / "extra").mkdir()
    (earlier / "extra" / "note.txt").write_text("half")
    with Hub({NAME: {"main": backbone / "model", "step1000": earlier}}) as hub:
        yield hub


def ask(hub: Hub, home: Path, code: str) -> Any:
    """What `code` leaves in `out`, run by a client in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}\nprint(json.dumps(out))"],
        env=hub.environment(home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_says_what_there_is(hub: Hub, tmp_path: Path) -> None:
    out = ask(
        hub,
        tmp_path,
        f"""
from huggingface_hub import HfApi
api = HfApi()
info = [api.repo_info("{NAME}", revision=r) for r in (None, "step1000")]
refs = {{b.name: b.target_commit for b in api.list_repo_refs("{NAME}").branches}}
tree = [
    sorted(f.path for f in api.list_repo_tree("{NAME}", revision="step1000", recursive=recursive))
    for recursive in (False, True)
]
out = [[i.sha for i in info], sorted(s.rfilename for s in info[1].siblings), refs, tree]
""",
    )
    commits, siblings, refs, (top, whole) = out
    assert commits == [hub.tree(NAME).commit, hub.tree(NAME, "step1000").commit]
    assert len(set(commits)) == 2
    assert all(len(commit) == 40 for commit in commits)
    assert refs == dict(zip(("main", "step1000"), commits, strict=True))
    assert siblings == sorted(hub.tree(NAME, "step1000").blobs)
    assert whole == sorted([*siblings, "extra"])
    assert top == [path for path in whole if "/" not in path]


def test_downloads_what_is_wanted_and_once(hub: Hub, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from huggingface_hub import hf_hub_download, snapshot_download
wanted = ["*.json", "extra/*"]
folder = Path(snapshot_download("{NAME}", revision="step1000", allow_patterns=wanted))
files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
out = [folder.name, files, hf_hub_download("{NAME}", "model.safetensors", revision="step1000")]
"""
    commit, files, weights = ask(hub, tmp_path, code)
    tree = hub.tree(NAME, "step1000")
    assert commit == tree.commit
    assert files == sorted(path for path in tree.blobs if path != "model.safetensors")
    assert Path(weights).read_bytes() == tree.blobs["model.safetensors"].file.read_bytes()
    assert hub.sent("model.safetensors") == tree.blobs["model.safetensors"].size
    hub.requests.clear()
    again = ask(hub, tmp_path, code)
    assert again == [commit, sorted(tree.blobs), weights]
    assert not any(hub.sent(Path(path).name) for path in tree.blobs)


def test_transformers_loads_a_revision(hub: Hub, tmp_path: Path) -> None:
    sizes, sums = ask(
        hub,
        tmp_path,
        f"""
from transformers import AutoConfig, AutoModelForCausalLM
configs = [AutoConfig.from_pretrained("{NAME}", revision=r) for r in ("main", "step1000")]
models = [
    AutoModelForCausalLM.from_pretrained("{NAME}", revision=r, use_safetensors=True)
    for r in ("main", "step1000")
]
out = [
    [c.hidden_size for c in configs],
    [m.get_output_embeddings().weight.abs().sum().item() for m in models],
]
""",
    )
    assert sizes == [16, 16]
    assert sums[0] == pytest.approx(2 * sums[1]) != 0


def test_sends_a_part_of_a_file(hub: Hub, tmp_path: Path) -> None:
    out = ask(
        hub,
        tmp_path,
        f"""
from huggingface_hub import HfFileSystem
with HfFileSystem().open("{NAME}@step1000/model.safetensors", block_size=1024) as file:
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length).decode()
    file.seek(-1000, 2)
    out = [header, file.read(10).hex(), file.size]
""",
    )
    blob = hub.tree(NAME, "step1000").blobs["model.safetensors"]
    data = blob.file.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    assert out == [header, data[-1000:-990].hex(), blob.size]
    assert 0 < hub.sent("model.safetensors") < len(header) + 6 * 1024 < blob.size / 4
    assert {r.method for r in hub.requests if r.path.endswith(".safetensors")} == {"GET"}


def test_says_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    out = ask(
        hub,
        tmp_path,
        f"""
from huggingface_hub import HfApi, hf_hub_download
tries = [
    lambda: HfApi().repo_info("lmsat/none"),
    lambda: HfApi().repo_info("{NAME}", revision="step7"),
    lambda: hf_hub_download("{NAME}", "none.json"),
    lambda: hf_hub_download("{NAME}", "config.json", revision="step7"),
]
out = []
for attempt in tries:
    try:
        attempt()
    except Exception as error:
        out.append(type(error).__name__)
""",
    )
    revision = "RevisionNotFoundError"
    assert out == ["RepositoryNotFoundError", revision, "RemoteEntryNotFoundError", revision]


@pytest.mark.parametrize(
    ("wanted", "part"), [("0-9", slice(10)), ("20-", slice(20, None)), ("-7", slice(-7, None))]
)
def test_ranges(hub: Hub, backbone: Path, wanted: str, part: slice) -> None:
    url = f"{hub.url}/{NAME}/resolve/main/config.json"
    data = (backbone / "model" / "config.json").read_bytes()
    request = urllib.request.Request(url, headers={"Range": f"bytes={wanted}"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, data[part])
    request.headers["Range"] = f"bytes={len(data)}-"
    with pytest.raises(urllib.error.HTTPError, match="416"):
        urllib.request.urlopen(request)
