"""One tensor out of a checkpoint, and nothing else of it."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.errors import BadInput
from tests.hub import Hub
from tests.trainables.test_frozen import CPU, saved, section
from trainables import frozen, pretrain, tensors
from trainables.heads import Fixed


def read(folder: Path, **fields: Any) -> Fixed:
    return tensors.head(section(folder, **fields))


def kept_alone(file: Path, *names: str) -> None:
    """Leave holes where a file has other tensors than these, and nothing after them."""
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    with file.open("wb") as partial:
        partial.write(data[:start])
        for name, entry in json.loads(data[8:start]).items():
            if name in names:
                first, last = entry["data_offsets"]
                partial.seek(start + first)
                partial.write(data[start + first : start + last])


def test_the_head_of_an_own_model(backbone: Path) -> None:
    weights = load_file(backbone / "model" / "model.safetensors")
    found = read(backbone / "model")
    assert found.factors()[0].equal(weights["lm_head.weight"])
    assert found.factors()[1] is None and found.bias is None
    assert found.factors()[0].equal(frozen.load(section(backbone), "fp32", CPU).weight)


def test_the_factors_of_a_trial(tmp_path: Path, cache: Path, tiny_trial: dict[str, Any]) -> None:
    tiny_trial["head"]["rank"] = 4
    tiny_trial["train"]["tokens"] = 2048
    pretrain.train(tiny_trial, tmp_path, cache)
    model = tmp_path / "trials" / tiny_trial["id"] / "model"
    weights = load_file(model / "model.safetensors")
    out, down = read(model).factors()
    assert down is not None and (out.shape, down.shape) == ((1024, 4), (4, 16))
    assert out.equal(weights["lm_head.A"]) and down.equal(weights["lm_head.B"])


@pytest.mark.parametrize("kind", ["GPT2", "GPTJ", "GPTNeoX", "OPT", "Phi", "Llama"])
def test_heads_equal_those_of_loaded_models(tmp_path: Path, kind: str) -> None:
    """Tied ones (GPT2, OPT), ones with a bias (GPTJ, Phi), and one that its files call embed_out
    (GPTNeoX)."""
    saved(tmp_path, kind)
    found, whole = read(tmp_path), frozen.load(section(tmp_path), "fp32", CPU)
    assert found.factors()[0].equal(whole.weight)
    assert (found.bias is None) == (whole.bias is None) == (kind not in ("GPTJ", "Phi"))
    if found.bias is not None and whole.bias is not None:
        assert found.bias.equal(whole.bias) and found.bias.any()


def test_the_tied_head_of_weights_saved_without_one(tmp_path: Path) -> None:
    """As gpt2 lies on the hub: `wte`, not `transformer.wte`."""
    model = saved(tmp_path, "GPT2")
    model.base_model.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert read(tmp_path).factors()[0].equal(model.lm_head.weight)


def test_a_missing_head_is_not_the_embedding(tmp_path: Path) -> None:
    model = saved(tmp_path, "Llama", tie_word_embeddings=False)
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"no output head in its weights$"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path, "GPTJ").to(dtype)
    model.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert found.bias is not None
    assert found.out.dtype == found.bias.dtype == torch.float32
    assert found.out.equal(model.lm_head.weight.float())
    assert found.bias.equal(model.lm_head.bias.float())


def test_only_the_heads_bytes_are_read(tmp_path: Path) -> None:
    """All others are gone from the file."""
    model = saved(tmp_path, "GPTJ", n_embd=64, n_layer=4)
    kept_alone(tmp_path / "model.safetensors", "lm_head.weight", "lm_head.bias")
    with pytest.raises(BadInput):
        frozen.load(section(tmp_path), "fp32", CPU)
    found = read(tmp_path)
    assert found.out.equal(model.lm_head.weight) and found.bias is not None
    assert found.bias.equal(model.lm_head.bias)


def test_only_the_heads_shard_is_read(tmp_path: Path) -> None:
    model = saved(tmp_path, "Phi")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    own = {places["lm_head.weight"], places["lm_head.bias"]}
    for shard in set(places.values()) - own:
        (tmp_path / shard).unlink()
    assert set(places.values()) - own
    found = read(tmp_path)
    assert found.out.equal(model.lm_head.weight) and found.bias is not None
    assert found.bias.equal(model.lm_head.bias)
    (tmp_path / places["lm_head.weight"]).unlink()
    with pytest.raises(BadInput, match=f"no {places['lm_head.weight']} here, which its index"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(BadInput, match="not an index of safetensors"):
        read(tmp_path)


def test_a_download_that_was_cut_short_is_made_whole_and_read(tmp_path: Path) -> None:
    """Each shard is fetched once, though it is asked for in several ways."""
    model = saved(tmp_path / "model", "Phi")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "model.safetensors").unlink(missing_ok=True)
    code = f"""
from huggingface_hub import snapshot_download
from trainables import hub, tensors
snapshot_download("lmsat/phi", allow_patterns=["*.json", "*-00001-of-*"])
assert hub.cached("lmsat/phi", None, False) is None
folder = hub.download("lmsat/phi", None, False, None)
assert hub.cached("lmsat/phi", None, False) == folder
model = {section(Path("lmsat/phi"))}
tensors.head(model)
print(sorted(file.name for file in folder.glob("*.safetensors")))
"""
    shards = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    with Hub({"lmsat/phi": {"main": tmp_path / "model"}}) as hub:
        env = hub.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(shards)
        sizes = {name: (tmp_path / "model" / name).stat().st_size for name in shards}
        assert {name: hub.sent(name) for name in shards} == sizes


def long_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def of_integers(file: Path) -> None:
    save_file({"lm_head.weight": torch.ones(4, 4, dtype=torch.int32)}, file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "not a safetensors file, or cut short"),
    "text": (lambda file: file.write_text("no weights here at all"), "not a safetensors file"),
    "a list": (lambda file: file.write_bytes(struct.pack("<Q", 3) + b"[1]"), "not a safetensors"),
    "a header beyond its end": (long_header, "not a safetensors file, or cut short"),
    "half a header": (lambda file: os.truncate(file, 50), "not a safetensors file, or cut short"),
    "a part": (
        lambda file: os.truncate(file, file.stat().st_size - 1),
        r"\(100, 32\) .* cut short",
    ),
    "integers": (of_integers, "a tensor of type I32, not of floats"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_are_none(tmp_path: Path, damage: str) -> None:
    model = saved(tmp_path, "Llama", tie_word_embeddings=False)
    save_file({"lm_head.weight": model.lm_head.weight}, tmp_path / "model.safetensors")
    damaging, told = DAMAGE[damage]
    damaging(tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=told):
        read(tmp_path)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_pickle_is_read_where_the_user_allows_it(tmp_path: Path, mapped: bool) -> None:
    model = saved(tmp_path, "GPTJ")
    (tmp_path / "model.safetensors").unlink()
    weights = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), weights, _use_new_zipfile_serialization=mapped)
    torch.save(Wicked(tmp_path / "ran"), tmp_path / "training_args.bin")  # none of the weights
    with pytest.raises(BadInput, match="PyTorch pickles are read with --pickle alone"):
        read(tmp_path)
    found = read(tmp_path, pickle=True)
    assert found.out.equal(model.lm_head.weight) and found.bias is not None
    assert found.bias.equal(model.lm_head.bias)
    whole = frozen.load(section(tmp_path, pickle=True), "fp32", CPU)
    assert whole.weight.equal(model.lm_head.weight)
    assert not (tmp_path / "ran").exists()


class Wicked:
    """Runs a command where a pickle is trusted."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_wicked_pickle_never_runs(tmp_path: Path) -> None:
    saved(tmp_path, "GPTJ")
    (tmp_path / "model.safetensors").unlink()
    weights, ran = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"lm_head.weight": Wicked(ran)}, weights)
    model = section(tmp_path, pickle=True)
    for attempt in (lambda: tensors.head(model), lambda: frozen.load(model, "fp32", CPU)):
        with pytest.raises(BadInput) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not ran.exists()
    torch.load(weights, weights_only=False)
    assert ran.exists()


def gguf_file(folder: Path, matrices: dict[str, Tensor], quantized: bool) -> dict[str, Tensor]:
    """Written with the gguf library; what its matrices then are."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    held = {}
    for name, matrix in matrices.items():
        data = gguf.quants.quantize(matrix.numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        held[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_gguf_file(tmp_path: Path, tied: bool, quantized: bool) -> None:
    torch.manual_seed(0)
    matrices = {"token_embd.weight": torch.randn(100, 32), "output.weight": torch.randn(100, 32)}
    if tied:
        del matrices["output.weight"]
    held = gguf_file(tmp_path, matrices, quantized)
    name = "token_embd.weight" if tied else "output.weight"
    found = read(tmp_path, gguf_file="small.gguf").out
    assert found.equal(held[name])
    error = (found - matrices[name]).abs().max()
    assert 0 < error < 0.02 if quantized else error == 0


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    gguf_file(tmp_path, {"blk.0.attn_q.weight": torch.ones(4, 32)}, False)
    with pytest.raises(BadInput, match=r"no output.weight and no token_embd.weight in it"):
        read(tmp_path, gguf_file="small.gguf")
    gguf_file(tmp_path, {"output.weight": torch.ones(100, 32)}, False)
    for size in (file.stat().st_size - 1, 100, 10, 0):
        os.truncate(file, size)
        with pytest.raises(BadInput, match="not a GGUF file, or cut short"):
            read(tmp_path, gguf_file="small.gguf")


W = np.random.default_rng(0).normal(size=(20, 3))
WIDTHS: list[tuple[npt.NDArray[Any], torch.dtype]] = [
    (W, torch.float64),
    (W.astype(">f8"), torch.float64),
    (W.astype(np.float32), torch.float32),
    (W.astype(np.float16), torch.float32),
    (np.asfortranarray(W), torch.float64),
    (np.asfortranarray(W.astype(np.float32)), torch.float32),
    (np.arange(6, dtype=np.int32).reshape(3, 2), torch.float32),
]


@pytest.mark.parametrize(("array", "dtype"), WIDTHS)
def test_a_matrix_of_numpy(tmp_path: Path, array: npt.NDArray[Any], dtype: torch.dtype) -> None:
    np.save(tmp_path / "head.npy", array)
    tensors.check(tmp_path / "head.npy", None)
    out, down = tensors.matrix(tmp_path / "head.npy", None).factors()
    assert down is None and out.dtype == dtype
    assert np.array_equal(out.numpy(), array)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (W[0], r"two dimensions, not shape \(3,\)"),
        (W[None], r"two dimensions, not shape \(1, 20, 3\)"),
        (W[:0], r"two dimensions, not shape \(0, 3\)"),
        (W.astype(object), "not a matrix in numpy's format"),
        (W.astype(complex), "not a matrix of numbers"),
        (W.astype(str), "not a matrix of numbers"),
    ],
)
def test_arrays_that_are_no_matrix(tmp_path: Path, array: npt.NDArray[Any], told: str) -> None:
    file = tmp_path / "head.npy"
    np.save(file, array)
    for reading in (tensors.check, tensors.matrix):
        with pytest.raises(BadInput, match=told):
            reading(file, None)


def zipped(file: Path) -> None:
    with file.open("wb") as f:
        np.savez(f, W)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, 0),
        lambda file: os.truncate(file, 20),
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: file.write_text("1 2\n3 4\n"),
        zipped,
    ],
)
def test_numpy_files_that_are_none(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    file = tmp_path / "head.npy"
    np.save(file, W)
    damage(file)
    for reading in (tensors.check, tensors.matrix):
        with pytest.raises(BadInput, match=r"head.npy: not a matrix"):
            reading(file, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_matrix_of_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    file, w = tmp_path / "head.safetensors", torch.from_numpy(W).to(dtype)
    save_file({"w": w, "bias": torch.ones(20)}, file, metadata={"made": "here"})
    for name in (None, "w"):
        tensors.check(file, name)
        found = tensors.matrix(file, name).out
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.equal(w.to(found.dtype))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (None, r"--tensor NAME is one of: a 4x2, b 2, c 3x2$"),
        ("none", r"--tensor NAME is one of: a 4x2, b 2, c 3x2$"),
        ("b", r"two dimensions, not shape \(2,\)"),
    ],
)
def test_which_of_several_matrices(tmp_path: Path, name: str | None, told: str) -> None:
    file = tmp_path / "heads.safetensors"
    matrices = {"a": torch.ones(4, 2), "c": torch.zeros(3, 2), "b": torch.ones(2)}
    save_file(matrices, file)
    for reading in (tensors.check, tensors.matrix):
        with pytest.raises(BadInput, match=told):
            reading(file, name)
    assert tensors.matrix(file, "c").out.equal(matrices["c"])
