"""save and load: one TopK SAE to a folder and back, in each library's own format, with what it writes beside the weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsae

from ..cases import CHECKED, SHAPES, Case
from ..check import Wrong
from ..providers import DictionaryLearning, SAELens, Sparsify, Task, Unsupported
from ..providers.dictionary_learning import dictionary
from ..providers.ours import sae_of
from ..providers.sae_lens import sae_lens_sae
from ..providers.sparsify import sparse_coder
from .work import Flow, Prepared, Work

Named = dict[str, Tensor]
"""The weights under common names and layouts, with a SAE's own tensors."""


def prepare(work: str, device: torch.device, tiny: bool, folder: Path) -> Prepared:
    task = Task(Case("forward", "TopK"), CHECKED if tiny else SHAPES["C"], "fp32", device)
    expected = vars(task.weights())
    size = sum(t.nbytes for t in expected.values())

    def flow(name: str, save: Callable[[Path], Any], load: Callable[[Path], Named], note: str = "", ceiling=False) -> Flow:
        path = folder / name
        path.mkdir(exist_ok=True)
        save(path)

        def loaded() -> Named:
            found = load(path)
            for t in found.values():
                t.sum()  # what was only mapped into memory is read here
            return found

        def saved() -> Named:
            save(path)
            return load(path)

        return Flow(loaded, loaded, note, ceiling) if work == "load" else Flow(lambda: save(path), saved, note, ceiling)

    def ours() -> Flow:
        sae = sae_of(task)
        return flow("fastsae", sae.save, lambda path: named(fastsae.load(path, device)), "in SAELens' layout")

    def sae_lens() -> Flow:
        require(SAELens(), device)
        from sae_lens import SAE

        sae = sae_lens_sae(task)
        return flow("sae-lens", sae.save_model, lambda path: named(SAE.load_from_disk(path, str(device))))

    def dictionary_learning() -> Flow:
        require(DictionaryLearning(), device)
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        ae = dictionary(task)

        def load(path: Path) -> Named:
            found = AutoEncoderTopK.from_pretrained(path / "ae.pt", device=device)
            return {
                "W_enc": found.encoder.weight.T, "b_enc": found.encoder.bias,
                "W_dec": found.decoder.weight.T, "b_dec": found.b_dec,
            }  # fmt: skip

        return flow("dl", lambda path: torch.save(ae.state_dict(), path / "ae.pt"), load, "torch.save, as its trainSAE does")

    def sparsify() -> Flow:
        require(Sparsify(), device)
        from sparsify import SparseCoder

        coder = sparse_coder(task)

        def load(path: Path) -> Named:
            found = SparseCoder.load_from_disk(path, device)
            return {
                "W_enc": found.encoder.weight.T, "b_enc": found.encoder.bias, "W_dec": found.W_dec, "b_dec": found.b_dec
            }  # fmt: skip

        return flow("sparsify", coder.save_to_disk, load)

    def alone() -> Flow:
        tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in expected.items()}
        file = "weights.safetensors"
        return flow(
            "alone", lambda path: save_file(tensors, path / file), lambda path: load_file(path / file, str(device)),
            "four tensors, nothing beside them", ceiling=True,
        )  # fmt: skip

    def check(found: Named) -> None:
        for name, t in expected.items():
            if not (found[name].dtype == t.dtype and found[name].device.type == t.device.type and found[name].equal(t)):
                raise Wrong(f"{name} is not what was saved")

    ways = {
        "fastsae": ours, "sae-lens": sae_lens, "dictionary-learning": dictionary_learning, "sparsify": sparsify,
        "safetensors alone": alone,
    }  # fmt: skip
    verb = {"save": "written to a folder", "load": "read from a folder, every weight of it"}[work]
    said = f"a TopK SAE of D {task.shape.D}, F {task.shape.F:,} in fp32, {verb}"
    return Prepared(size, size, said, ways, check)


def require(library: SAELens | DictionaryLearning | Sparsify, device: torch.device) -> None:
    if reason := library.missing(device):
        raise Unsupported(reason)


def named(sae: Any) -> Named:
    return {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


WORKS = tuple(Work(name, "bytes", partial(prepare, name)) for name in ("save", "load"))
