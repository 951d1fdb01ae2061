"""Files that a stranger made: each gets a typed error at once, costs no memory, and nothing outside its folder is opened."""

import io
import json
import os
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import fastsae.formats
from fastsae import SAE, BatchTopK, ReLU, TopK
from fastsae.formats import FormatError, safe

D, F, K = 4, 16, 2
SECONDS, MEMORY_KB = 1.0, 64 * 1024

opened: list[str] | None = None  # an audit hook cannot be removed, so it is switched


def _audit(event, arguments):
    if opened is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


class Program:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, folder: Path):
        self.command = f"touch {folder / 'ran'}"

    def __reduce__(self):
        return os.system, (self.command,)


def saelens(folder: Path, activation=None) -> None:
    fastsae.formats.save(SAE(D, F, activation or TopK(K)), folder)


def cfg(text=None, **fields):
    """A valid folder with another cfg.json; a field that is `...` is taken out."""

    def build(folder: Path):
        saelens(folder)
        path = folder / "cfg.json"
        changed = {**json.loads(path.read_text()), **fields}
        data = json.dumps({k: v for k, v in changed.items() if v is not ...}) if text is None else text
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return build


def weights(data=None, header=None, body=b"", **tensors):
    """A valid folder with other weights: bytes, a header with a body, or some other tensors (`...` takes one out)."""

    def build(folder: Path):
        saelens(folder)
        path = folder / "sae_weights.safetensors"
        if data is not None:
            path.write_bytes(data(folder) if callable(data) else data)
        elif header is not None:
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        else:
            state = {"W_enc": torch.ones(D, F), "W_dec": torch.ones(F, D), "b_enc": torch.ones(F), "b_dec": torch.ones(D)}
            path.write_bytes(save({k: t for k, t in {**state, **tensors}.items() if t is not ...}))

    return build


def one(**entry):
    return weights(header={"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}, body=b"\0" * 8)


def beside(**fields):
    """A valid BatchTopK with another fastsae.json."""

    def build(folder: Path):
        saelens(folder, BatchTopK(K, threshold=0.5))
        path = folder / "fastsae.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return build


def extra(name, text, **fields):
    def build(folder: Path):
        cfg(**fields)(folder)
        (folder / name).write_text(text)

    return build


def linked(name, target, what="link"):
    def build(folder: Path):
        saelens(folder)
        (folder / name).rename(folder.parent / name)
        if what == "link":
            (folder / name).symlink_to(str(target).format(outside=folder.parent))
        elif what == "pipe":
            os.mkfifo(folder / name)
        elif what == "folder":
            (folder / name).mkdir()

    return build


def cache_with_blobs_elsewhere(folder: Path):
    """Looks like a snapshot in the Hub's cache, but its blobs are another folder."""
    inside = folder / "snapshots" / "main"
    saelens(inside)
    (inside / "cfg.json").rename(folder.parent / "cfg.json")
    (folder / "blobs").symlink_to(folder.parent)
    (inside / "cfg.json").symlink_to("../../blobs/cfg.json")
    return inside


ARRAYS = {
    "W_enc": np.ones((D, F), "f4"),
    "W_dec": np.ones((F, D), "f4"),
    "b_enc": np.ones(F, "f4"),
    "b_dec": np.ones(D, "f4"),
    "threshold": np.ones(F, "f4"),
}


def npz(change=lambda data: data, **arrays):
    def build(folder: Path):
        data = io.BytesIO()
        np.savez(data, **{k: a for k, a in {**ARRAYS, **arrays}.items() if a is not ...})
        (folder / "params.npz").write_bytes(change(data.getvalue()))

    return build


def npy(header, body=b"", **zip_options):
    """An .npz with one member whose npy header reads so."""

    def build(folder: Path):
        text = header.encode() + b"\n"
        with zipfile.ZipFile(folder / "params.npz", "w", **zip_options) as archive:
            archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)

    return build


def many_members(folder: Path):
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        for i in range(1_000):
            archive.writestr(f"{i:0100}", b"")


def twice(folder: Path):
    npz()(folder)
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "params.npz", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("W_enc.npy", zipfile.ZipFile(folder / "params.npz").read("W_enc.npy"))


def pickled(content, dict_class="AutoEncoder", **trainer):
    def build(folder: Path):
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, **trainer}}))
        torch.save(content(folder) if callable(content) else content, folder / "ae.pt")

    return build


def sparsify(**fields):
    def build(folder: Path):
        fastsae.formats.save(SAE(D, F, TopK(K)), folder, format="sparsify")
        (folder / "cfg.json").write_text(json.dumps({**json.loads((folder / "cfg.json").read_text()), **fields}))

    return build


def program_in_torch_file(folder: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"W_enc": Program(folder)}, data)
    return data.getvalue()


def header_of(tensors: int) -> bytes:
    return ("{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(tensors)) + "}").encode()


f32 = {"dtype": "F32", "shape": [2]}
DESCRIPTION = "{'descr': %s, 'fortran_order': False, 'shape': %s, }"

HOSTILE = {
    # the weights' container
    "torch file dressed as safetensors": weights(program_in_torch_file),
    "pickle dressed as safetensors": weights(b"\x80\x04\x95" + b"cos\nsystem\n(S'touch ran'\ntR." + bytes(64)),
    "empty weights": weights(b""),
    "seven bytes": weights(b"\0" * 7),
    "header of 2^60 bytes": weights(struct.pack("<Q", 2**60) + b"{}"),
    "header of 2^64 - 1 bytes": weights(struct.pack("<Q", 2**64 - 1) + b"{}"),
    "header beyond the file": weights(struct.pack("<Q", 100) + b"{}"),
    "header of 2 MB of spaces": weights(header=b"{" + b" " * 2**21 + b"}"),
    "400k tensors": weights(header=header_of(400_000)),
    "5000 tensors in a small header": weights(header=header_of(5_000)),
    "shape that overflows": one(shape=[2**40, 2**40]),
    "shape that overflows to the right length": one(shape=[2**62, 2**3, 2]),
    "negative shape": one(shape=[-2]),
    "shape of text": one(shape=["2"]),
    "shape of fractions": one(shape=[2.5]),
    "a hundred dimensions": one(shape=[1] * 99 + [2]),
    "overlapping tensors": weights(
        header={"a": {**f32, "data_offsets": [0, 8]}, "b": {**f32, "data_offsets": [4, 12]}}, body=b"\0" * 12
    ),
    "tensors with a hole": weights(
        header={"a": {**f32, "data_offsets": [0, 8]}, "b": {**f32, "data_offsets": [16, 24]}}, body=b"\0" * 24
    ),
    "offsets beyond the file": one(data_offsets=[2**40, 2**40 + 8]),
    "offsets backwards": one(data_offsets=[8, 0]),
    "three offsets": one(data_offsets=[0, 4, 8]),
    "data cut short": weights(header={"W_enc": {**f32, "data_offsets": [0, 8]}}, body=b"\0" * 4),
    "data after the end": weights(header={"W_enc": {**f32, "data_offsets": [0, 8]}}, body=b"\0" * 80),
    "unknown dtype": one(dtype="F31"),
    "dtype is a list": one(dtype=["F32"]),
    "same tensor twice": weights(header=b'{"a": %s, "a": %s}' % ((json.dumps({**f32, "data_offsets": [0, 8]}).encode(),) * 2)),
    "header is a list": weights(header=b"[1, 2]"),
    "header is no text": weights(header=b'{"\xff\xfe": 1}'),
    "header nested 100k deep": weights(header=b'{"a":' * 100_000),
    "entry is a number": weights(header={"W_enc": 1}),
    "metadata is not text": weights(header={"__metadata__": {"a": [1]}}),
    # the weights
    "integer weights": weights(W_enc=torch.ones(D, F, dtype=torch.int32)),
    "boolean bias": weights(b_enc=torch.ones(F, dtype=torch.bool)),
    "NaN weights": weights(W_dec=torch.full((F, D), float("nan"))),
    "infinite bias": weights(b_dec=torch.full((D,), -torch.inf)),
    "no encoder": weights(W_enc=...),
    "no bias": weights(b_enc=...),
    "vector for a matrix": weights(W_enc=torch.ones(D * F)),
    "decoder of another width": weights(W_dec=torch.ones(F + 1, D)),
    "empty encoder": weights(W_enc=torch.ones(D, 0), W_dec=torch.ones(0, D), b_enc=torch.ones(0)),
    "a tensor too many": weights(**{"../../etc/passwd": torch.ones(1)}),
    "bias of the wrong length": weights(b_enc=torch.ones(1)),
    # cfg.json
    "no config": linked("cfg.json", "", what="nothing"),
    "empty config": cfg(""),
    "config of 2 MB": cfg("{" + " " * 2**21 + "}"),
    "config is a list": cfg("[]"),
    "config cut short": cfg('{"d_in": 4'),
    "config is no text": cfg(b"\xff\xfe\xff"),
    "duplicate key": cfg('{"d_in": 4, "d_in": 5}'),
    "duplicate key deep inside": cfg('{"metadata": {"a": [{"k": 1, "k": 2}]}}'),
    "NaN": cfg('{"d_in": NaN}'),
    "Infinity": cfg('{"d_in": -Infinity}'),
    "1e999": cfg('{"d_in": 1e999}'),
    "nested 400k deep": cfg("[" * 400_000),
    "integer of 100k digits": cfg('{"d_in": ' + "9" * 100_000 + "}"),
    "integer of 4000 digits": cfg('{"d_in": ' + "9" * 4000 + "}"),
    "no architecture": cfg(architecture=..., metadata={"sae_lens_version": "6.0.0"}),
    "unknown architecture": cfg(architecture="__import__"),
    "architecture is a list": cfg(architecture=["topk"]),
    "no d_in": cfg(d_in=...),
    "d_sae 2^40": cfg(d_sae=2**40),
    "d_sae negative": cfg(d_sae=-16),
    "d_sae text": cfg(d_sae="16"),
    "d_sae not the weights'": cfg(d_sae=8),
    "d_in true": cfg(d_in=True),
    "k zero": cfg(k=0),
    "k more than d_sae": cfg(k=F + 1),
    "k 2^70": cfg(k=2**70),
    "k a fraction": cfg(k=2.5),
    "k text": cfg(k="NaN"),
    "k null": cfg(k=None),
    "k missing": cfg(k=...),
    "unknown dtype name": cfg(dtype="os.system"),
    "unknown normalisation": cfg(normalize_activations="exec"),
    "flag is text": cfg(apply_b_dec_to_input="yes"),
    "metadata is a list": cfg(metadata=[1]),
    "transcoder without d_out": cfg(architecture="transcoder"),
    # what lies beside it
    "unknown activation beside": beside(activation="eval"),
    "k beside more than d_sae": beside(k=F + 1),
    "threshold beside is text": beside(threshold="0.5"),
    "threshold beside is another": beside(threshold=0.75),
    "fastsae.json of another SAE": extra("fastsae.json", '{"activation": "JumpReLU", "bandwidth": 1}'),
    "negative data scale": extra("activation_scaler.json", '{"scaling_factor": -1}'),
    "data scale is text": extra("activation_scaler.json", '{"scaling_factor": "1"}'),
    # links and what is no file
    "config linked out": linked("cfg.json", "../cfg.json"),
    "config linked out by an absolute path": linked("cfg.json", "{outside}/cfg.json"),
    "config linked to /etc/passwd": linked("cfg.json", "/etc/passwd"),
    "weights linked out": linked("sae_weights.safetensors", "../sae_weights.safetensors"),
    "weights linked to /dev/zero": linked("sae_weights.safetensors", "/dev/zero"),
    "link to itself": linked("cfg.json", "cfg.json"),
    "link to nothing": linked("cfg.json", "gone.json"),
    "config is a pipe": linked("cfg.json", "", what="pipe"),
    "config is a folder": linked("cfg.json", "", what="folder"),
    "cache with blobs elsewhere": cache_with_blobs_elsewhere,
    # Gemma Scope
    "npz is no zip": npz(lambda data: b"PK" + bytes(200)),
    "npz cut short": npz(lambda data: data[: len(data) // 2]),
    "npz with its middle overwritten": npz(lambda data: data[:40] + b"\xff" * 60 + data[100:]),
    "npz with an object array": npz(W_enc=np.array([[Program(Path("/nowhere"))]], dtype=object)),
    "npz of integers": npz(W_enc=np.ones((D, F), "i4")),
    "npz of other endianness": npz(W_enc=np.ones((D, F), ">f4")),
    "npz of records": npz(W_enc=np.ones((D, F), [("a", "f4"), ("b", "f4")])),
    "npz with NaN": npz(b_enc=np.full(F, np.nan, "f4")),
    "npz without a decoder": npz(W_dec=...),
    "npz with a member named ../": npz(**{"../b_enc": np.ones(F, "f4")}),
    "npz with a long directory": many_members,
    "npz with an array twice": twice,
    "npz of 2^60 elements": npy(DESCRIPTION % ("'<f4'", (2**60,)), b"\0" * 16),
    "npz whose header is a program": npy("__import__('os').system('touch ran')"),
    "npz whose header nests": npy("(" * 5000 + ")" * 5000),
    "npz bomb": npy(DESCRIPTION % ("'<f4'", (2**24,)), bytes(2**26), compression=zipfile.ZIP_DEFLATED),
    # dictionary_learning
    "pickle without permission": pickled({}),
    "unknown class": pickled({}, dict_class="os.system"),
    # sparsify
    "sparsify groupmax": sparsify(activation="groupmax"),
    "sparsify d_in 2^40": sparsify(d_in=2**40),
    "sparsify expansion that overflows": sparsify(num_latents=0, expansion_factor=2**31 - 1),
    "sparsify skip without weights": sparsify(skip_connection=True),
}
PICKLES = {
    "program": pickled(lambda folder: {"bias": Program(folder)}),
    "no state dict": pickled([torch.ones(2)]),
    "numbers for tensors": pickled({"bias": 1.0}),
    "tensors of the wrong shape": pickled({"encoder.weight": torch.ones(F, D), "decoder.weight": torch.ones(2, 2)}),
    "k that differs": pickled({"k": torch.tensor(3)}, dict_class="AutoEncoderTopK", k=2),
}


def peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.fixture(scope="module", autouse=True)
def everything_imported(tmp_path_factory):
    """What a first load imports is not what a hostile file opens or costs."""
    folder = tmp_path_factory.mktemp("valid")
    saelens(folder / "saelens")
    (folder / "npz").mkdir()
    npz()(folder / "npz")
    fastsae.formats.save(SAE(D, F, ReLU()), folder / "pickle", format="dictionary_learning")
    for name in ("saelens", "npz", "pickle"):
        fastsae.formats.load(folder / name, allow_pickle=True)


def refused(folder: Path, monkeypatch, **options) -> None:
    """Loading it is a typed error, at once, in little memory, within its folder."""
    global opened
    by_rust: list[Path] = []  # opens that no audit hook sees
    monkeypatch.setattr(safe, "load_file", lambda path, load=safe.load_file: (by_rust.append(path), load(path))[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before, opened, start = peak_kb(), [], time.process_time()  # what else the machine does is not ours
    try:
        with pytest.raises((FormatError, FileNotFoundError)) as error:
            fastsae.formats.load(folder, **options)
    finally:
        seconds, names, opened = time.process_time() - start, opened, None
    assert seconds <= SECONDS
    assert peak_kb() - before <= MEMORY_KB
    outside = [name for name in [*names, *map(str, by_rust)] if folder not in Path(name).resolve().parents]
    assert not outside
    assert not any(Path(place, "ran").exists() for place in (folder, "."))
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, monkeypatch, name):
    folder = tmp_path / "sae"
    folder.mkdir()
    refused(HOSTILE[name](folder) or folder, monkeypatch)


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused_where_pickles_are_allowed(tmp_path, monkeypatch, name):
    PICKLES[name](tmp_path)
    refused(tmp_path, monkeypatch, allow_pickle=True)


VALID = {
    "saelens": lambda folder: saelens(folder, BatchTopK(K, threshold=0.5)),
    "sparsify": sparsify(),
    "gemma_scope": npz(),
    "dictionary_learning": lambda folder: fastsae.formats.save(SAE(D, F, TopK(K)), folder, "dictionary_learning"),
}


@pytest.mark.parametrize("format", VALID)
def test_a_flipped_bit_gives_an_sae_or_a_typed_error(tmp_path, format):
    VALID[format](tmp_path)
    random, outcomes = np.random.default_rng(0), set()
    files = sorted(tmp_path.iterdir())
    for _ in range(4 * int(os.environ.get("FASTSAE_EXAMPLES", "25"))):
        path = files[random.integers(len(files))]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            outcomes.add(type(fastsae.formats.load(tmp_path, allow_pickle=True)))
        except FormatError as error:
            outcomes.add(type(error))
        path.write_bytes(whole)
    assert outcomes == {SAE, FormatError}


@pytest.mark.parametrize("name", ["../cfg.json", "/etc/passwd", "a/b", "..", ".", ""])
def test_only_files_directly_in_the_folder_have_names(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").touch()
    with pytest.raises(FormatError, match="drop the path"):
        safe.Folder(tmp_path).file(name)


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0123" / "layer_1", tmp_path / "blobs"
    saelens(snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../../blobs/{path.name}")
    assert fastsae.formats.load(snapshot).d_sae == F
