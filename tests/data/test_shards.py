import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources import KINDS, Numbered, assert_equal, assert_resumes, numbers

from fastsae.checkpoint import CheckpointError
from fastsae.data import Plain, Prefetch, ShardError, Shards, Shuffle, Superposition, write_shards

ROOT = Path(__file__).parents[2]
ROW = {"x": 16, "pair": 32, "dict": 24}  # bytes


def write(path, rows=100, kind="x", dtype=torch.bfloat16, shard_rows=30, **options):
    write_shards(Numbered(200, kind, dtype), path, rows, shard_bytes=shard_rows * ROW[kind], **options)
    return path


@pytest.fixture(autouse=True)
def flushed(monkeypatch):
    """What is flushed, by name. Nothing is in fact: that is slow, and only a power failure could tell."""
    names = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    return names


@pytest.fixture
def acts(tmp_path):
    return write(tmp_path / "acts")


def shard(folder, i=1):
    return folder / f"shard-{i:05d}.safetensors"


def edit_index(folder, edit):
    index = json.loads((folder / "index.json").read_text())
    edit(index)
    (folder / "index.json").write_text(json.dumps(index))


def everything(path, **options):
    return [n for batch in Shards(path, epochs=1, **options) for n in numbers(batch)]


# ── what is read is what was written ─────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 150), st.sampled_from(KINDS), st.integers(10, 60), st.integers(1, 40), st.integers(1, 4))
def test_ranks_read_every_row_once_bit_for_bit(tmp_path_factory, rows, kind, shard_rows, block_rows, world_size):
    """Taking turns, they read what one alone would."""
    path = write(tmp_path_factory.mktemp("s") / "acts", rows, kind, shard_rows=shard_rows)
    alone = [numbers(b) for b in Shards(path, block_rows=block_rows, seed=rows, epochs=1)]
    assert sorted(sum(alone, [])) == list(range(rows))
    assert max(map(len, alone)) <= block_rows
    if len(alone) < world_size:
        with pytest.raises(ValueError, match="smaller blocks"):
            Shards(path, block_rows=block_rows, world_size=world_size)
        return
    options = {"block_rows": block_rows, "seed": rows, "world_size": world_size, "epochs": 1}
    ranks = [[numbers(b) for b in Shards(path, rank=rank, **options)] for rank in range(world_size)]
    assert sum(map(len, ranks)) == len(alone)
    assert alone == [ranks[i % world_size][i // world_size] for i in range(len(alone))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_in_order_it_is_the_source(tmp_path, kind, dtype):
    """The numbers are in the bits: as bfloat16 they are NaNs, infinities and denormals too."""
    read = Shards(write(tmp_path / "acts", 200, kind, dtype), block_rows=7, shuffle=False, epochs=1)
    assert sum((numbers(b) for b in read), []) == list(range(200))
    assert_equal(next(Shards(tmp_path / "acts", block_rows=1, shuffle=False)), batch_of_one(kind, dtype))


def batch_of_one(kind, dtype):
    return next(Shuffle(Numbered(1, kind, dtype), 1, 1))


def test_each_epoch_has_its_order_and_each_seed(acts):
    source = Shards(acts, block_rows=5, seed=3)
    blocks = 4 * 6 - 4  # of 30, 30, 30 and 10 rows
    epochs = [[numbers(next(source)) for _ in range(blocks)] for _ in range(3)]
    assert all(sorted(sum(e, [])) == list(range(100)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = Shards(acts, block_rows=5, seed=3, epochs=3)
    assert [numbers(b) for b in again] == sum(epochs, [])
    assert next(again, None) is None
    assert everything(acts, block_rows=5, seed=4) != sum(epochs[0], [])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp("kinds") / kind, kind=kind) for kind in KINDS}


@given(st.integers(0, 60), st.sampled_from(KINDS), st.integers(1, 3))
def test_resumes_at_any_moment(kinds, at, kind, world_size):
    def make():
        return Shards(kinds[kind], block_rows=6, seed=5, rank=world_size - 1, world_size=world_size, epochs=3)

    assert_resumes(make, at)
    assert_resumes(lambda: Shuffle(Prefetch(make()), 40, 8), at)


def test_a_state_of_other_data_or_another_plan_is_refused(acts, tmp_path):
    state = Shards(acts).state_dict()
    other = write(tmp_path / "other", 99)
    for wrong in (Shards(other), Shards(acts, seed=1), Shards(acts, block_rows=9), Shards(acts, shuffle=False)):
        with pytest.raises(ValueError, match="as the saved one was"):
            wrong.load_state_dict(state)


def test_one_field_is_read_as_rows_and_two_as_a_pair(tmp_path):
    path = write(tmp_path / "acts", kind="dict")
    whole = next(Shards(path, shuffle=False))
    assert_equal(next(Shards(path, shuffle=False, field="blocks.1")), whole["blocks.1"])
    assert_equal(next(Shards(path, shuffle=False, field=("blocks.1", "blocks.0"))), (whole["blocks.1"], whole["blocks.0"]))
    with pytest.raises(ValueError, match=r"no field 'blocks\.7'.*blocks\.0"):
        Shards(path, field="blocks.7")


def test_chunks_own_their_memory(acts):
    """A file that is cut afterwards does not reach into them."""
    batch = next(Shards(acts))
    assert batch.untyped_storage().nbytes() == batch.nbytes


def test_the_index_says_what_the_shards_hold(acts, tmp_path):
    path = write(tmp_path / "more", 100, "dict", metadata={"model": "gpt2", "hooks": ["a", "b"], "context": 128})
    index = Shards(path).index
    assert index["metadata"] == {"model": "gpt2", "hooks": ["a", "b"], "context": 128}
    assert index["rows"] == 100 and [s["rows"] for s in index["shards"]] == [30, 30, 30, 10]
    assert index["fields"]["blocks.0"] == {"shape": [4], "dtype": "bfloat16"}
    assert sorted(p.name for p in path.iterdir()) == [".lock", "index.json"] + [shard(path, i).name for i in range(4)]
    Shards(path).verify()


def test_files_take_less_than_a_hundredth_more_than_their_rows(tmp_path):
    write_shards(Superposition(64, 128, batch_size=512, dtype=torch.bfloat16), tmp_path / "acts", 10_000, shard_bytes=1 << 19)
    size = sum(p.stat().st_size for p in (tmp_path / "acts").iterdir())
    assert 10_000 * 128 <= size <= 10_000 * 128 * 1.01


def test_modes_honour_the_umask(tmp_path):
    former = os.umask(0o027)
    try:
        path = write(tmp_path / "acts")
    finally:
        os.umask(former)
    assert {p.stat().st_mode & 0o777 for p in path.iterdir() if p.name != ".lock"} == {0o640}


# ── writing: all or nothing, and on from where it stopped ────────────────────────────────────────────────────────────────


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(KINDS))
def test_an_interrupted_write_goes_on(tmp_path_factory, first, second, kind):
    """Stopped twice at random reads, the files are those of a write that was never stopped."""
    folder = tmp_path_factory.mktemp("s")
    whole, path = write(folder / "whole", 200, kind), folder / "acts"
    for polls in (first, second):
        left = iter(range(polls))

        def poll(left=left):
            if next(left, None) is None:
                raise InterruptedError

        try:
            write(path, 200, kind, poll=poll)
            break
        except InterruptedError:
            with pytest.raises(FileNotFoundError, match="has finished"):
                Shards(path)
    else:
        write(path, 200, kind)
    assert {p.name for p in path.iterdir()} == {p.name for p in whole.iterdir()}
    for file in whole.iterdir():
        assert file.name == ".lock" or file.read_bytes() == (path / file.name).read_bytes()


KILLED = """
import itertools, os, signal, sys
sys.path.insert(0, "tests")
from sources import Numbered
from fastsae.data import write_shards

os.fsync = lambda fd: None
for n in itertools.count(1):
    folder, count = f"{sys.argv[1]}/{n}", itertools.count(1)
    def dying(f):
        return lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL) if next(count) == n else f(*a, **k)
    child = os.fork()
    if child == 0:
        os.fsync, os.replace, os.rename = map(dying, (os.fsync, os.replace, os.rename))
        write_shards(Numbered(40), folder, shard_bytes=16 * 25)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    if not os.path.exists(f"{folder}/index.json"):
        write_shards(Numbered(40), folder, shard_bytes=16 * 25)
print(n)
"""


def test_killed_at_any_flush_or_rename_it_goes_on(tmp_path):
    """kill -9 at the n-th of them, for every n; then the same call again, unless it had finished."""
    whole = tmp_path / "whole"
    write_shards(Numbered(40), whole, shard_bytes=16 * 25)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
    for n in range(1, int(done.stdout)):
        for i in range(2):
            assert shard(tmp_path / str(n), i).read_bytes() == shard(whole, i).read_bytes()
        assert Shards(tmp_path / str(n)).index == Shards(whole).index


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, flushed, monkeypatch):
    def replace(part, file, really=os.replace):
        assert flushed[-1] == part.name
        really(part, file)
        flushed.append(f"{file.name} is there")

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "acts")
    for name in [*(shard(tmp_path, i).name for i in range(4)), "index.json"]:
        assert flushed[flushed.index(f"{name} is there") + 1] == "acts"  # the folder
    assert flushed[-2:] == ["index.json is there", "acts"]


def test_the_source_may_end_before_or_with_the_rows(tmp_path):
    path = tmp_path / "acts"
    with pytest.raises(ValueError, match="ended after 50 of 60 rows"):
        write_shards(Numbered(50), path, 60, shard_bytes=16 * 20)
    with pytest.raises(ValueError, match="pass rows >= 40"):
        write_shards(Numbered(50), path, 30, shard_bytes=16 * 20)
    write_shards(Numbered(50), path, shard_bytes=16 * 20)
    assert sorted(everything(path)) == list(range(50))
    with pytest.raises(ValueError, match="has no rows"):
        write_shards(Numbered(0), tmp_path / "none")
    with pytest.raises(ValueError, match="pass rows >= 1"):
        write_shards(Numbered(5), tmp_path / "none", 0)


def test_folders_in_use_are_refused(acts, tmp_path):
    with pytest.raises(FileExistsError, match="finished set of shards"):
        write(acts)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="pass a new folder"):
        write(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="in use"):
        write(tmp_path / "two", poll=lambda: write(tmp_path / "two"))


def test_a_full_disk_is_said_beforehand_and_costs_no_shard(tmp_path, monkeypatch):
    path, usage = tmp_path / "acts", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6) if shard(path).exists() else usage)
    with pytest.raises(OSError, match="bytes are needed and 1000000 are free.*shard-00002") as error:
        write(path)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    write(path)
    assert sorted(everything(path)) == list(range(100))


def test_rows_that_change_are_refused(tmp_path):
    with pytest.raises(ValueError, match="yield the same always"):
        write_shards(Plain([torch.zeros(3, 2), torch.zeros(3, 3)]), tmp_path / "acts", 6)


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.data())
def test_a_flipped_bit_is_found_by_verify(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("s") / "acts", 40)
    file = shard(path, data.draw(st.integers(0, 1)))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)
    with pytest.raises(ShardError, match=file.name):
        Shards(path).verify()


@given(st.integers(0, 600))
def test_a_cut_or_longer_shard_is_refused_at_once(tmp_path_factory, size):
    path = write(tmp_path_factory.mktemp("s") / "acts")
    file = shard(path)
    content = file.read_bytes()
    assert len(content) != size or pytest.skip("that is its size")
    file.write_bytes((content * 2)[:size])
    with pytest.raises(ShardError, match=rf"{file.name} has {size} bytes"):
        Shards(path)


def test_missing_and_exchanged_files_are_named(acts):
    a, b = shard(acts, 0), shard(acts, 1)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    with pytest.raises(ShardError, match=a.name):
        Shards(acts).verify()
    a.write_bytes(content)
    b.unlink()
    with pytest.raises(ShardError, match=f"{b.name} is missing"):
        Shards(acts)
    (acts / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="index.json does not exist"):
        Shards(acts)


def test_shards_outside_the_folder_are_not_opened(acts, tmp_path):
    outside = tmp_path / "shard-00001.safetensors"
    shutil.copy(shard(acts), outside)
    for name in ("../shard-00001.safetensors", str(outside), "a/../../shard-00001.safetensors", "..", "", ".", "nul\0"):
        edit_index(acts, lambda index, name=name: index["shards"][1].update(file=name))
        with pytest.raises(ShardError, match="index.json"):
            Shards(acts)
    edit_index(acts, lambda index: index["shards"][1].update(file=shard(acts).name))
    Shards(acts)
    shard(acts).unlink()
    shard(acts).symlink_to(outside)
    with pytest.raises(ShardError, match="no link out of it"):
        Shards(acts)


LIES = {
    "other format": lambda i: i.update(format="zarr"),
    "later version": lambda i: i.update(version=2),
    "no fields": lambda i: i.pop("fields"),
    "fields is a list": lambda i: i.update(fields=[]),
    "a dtype that is none": lambda i: i["fields"]["x"].update(dtype="Tensor"),
    "a dtype that does not exist": lambda i: i["fields"]["x"].update(dtype="float7"),
    "another dtype": lambda i: i["fields"]["x"].update(dtype="float16"),
    "another shape": lambda i: i["fields"]["x"].update(shape=[4, 2]),
    "a large shape": lambda i: i["fields"]["x"].update(shape=[2**40, 2**40]),
    "a negative shape": lambda i: i["fields"]["x"].update(shape=[-8, -1]),
    "a field that is not there": lambda i: i["fields"].update(y=i["fields"].pop("x")),
    "no shards": lambda i: i.update(shards=[], rows=0),
    "total": lambda i: i.update(rows=99),
    "fewer rows": lambda i: (i["shards"][0].update(rows=29), i.update(rows=99)),
    "negative rows": lambda i: (i["shards"][0].update(rows=-30), i.update(rows=40)),
    "rows that are no number": lambda i: i["shards"][0].update(rows="30"),
    "an entry too many": lambda i: i["shards"][0].update(url="http://localhost"),
    "an entry too few": lambda i: i["shards"][0].pop("bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(acts, lie):
    edit_index(acts, LIES[lie])
    with pytest.raises(ShardError, match="index.json|shard-0000"):
        Shards(acts, shuffle=False).read(0)


def test_an_index_or_shard_that_is_not_one_is_refused(acts):
    good = (acts / "index.json").read_bytes()
    for text in (b"", b"[]", b"null", b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff", good[: len(good) // 2]):
        (acts / "index.json").write_bytes(text)
        with pytest.raises(ShardError, match="index.json"):
            Shards(acts)
    (acts / "index.json").write_bytes(good)
    size = shard(acts).stat().st_size
    for start in (b"", (2**60).to_bytes(8, "little"), (size - 8).to_bytes(8, "little"), b"\x80\x04\x95"):
        shard(acts).write_bytes(start.ljust(size, b" "))
        with pytest.raises(ShardError, match=f"{shard(acts).name} is damaged"):
            list(Shards(acts, epochs=1))


def test_arguments_are_checked(acts):
    for options, message in [
        ({"block_rows": 0}, "block_rows >= 1"),
        ({"rank": 2, "world_size": 2}, "rank < world_size"),
        ({"rank": -1}, "rank < world_size"),
        ({"world_size": 9}, "smaller blocks"),
    ]:
        with pytest.raises(ValueError, match=message):
            Shards(acts, **options)
