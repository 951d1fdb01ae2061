"""SAEs on the Hugging Face Hub: `from_pretrained` by SAELens release name or repository, `push_to_hub` with a model card.

Downloads go through huggingface_hub: its cache, its token, HF_HUB_OFFLINE and HF_ENDPOINT hold here too.
"""

import glob
import tempfile
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import formats
from .formats import FORMATS, FormatError, saelens
from .formats.parts import Parts, put_together, take_apart
from .formats.safe import Config, Folder, read_json, read_safetensors
from .optional import need
from .sae import SAE

# SAELens' converters that read safetensors and npz; what others read can hide a program
WITHOUT_PICKLE = (
    "gemma_2",
    "gemma_2_transcoder",
    "gemma_3",
    "llama_scope",
    "llama_scope_r1_distill",
    "mntss_clt_layer_transcoder",
    "mwhanna_transcoder",
)


def from_pretrained(
    release: str,
    sae_id: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> SAE:
    """A published SAE, in eval mode.

    `release` is a SAELens release name (its list is read from sae-lens where that is installed) and `sae_id` one of its SAEs;
    or `release` is a repository on the Hub and `sae_id` the folder in it. `allow_pickle` as in `fastsae.load`.
    """
    releases = _releases()
    if release in releases:
        return put_together(_released(releases[release], sae_id, allow_pickle), device, dtype).eval()
    if "/" not in release:
        if releases:
            raise _unknown("release", release, releases)
        raise ValueError(f"{release!r} is no repository (owner/name), and release names need sae-lens: pip install sae-lens")
    return formats.load(_download(release, sae_id), device, dtype, allow_pickle)


def _releases() -> Mapping[str, Any]:
    """SAELens' list of published SAEs."""
    try:
        directory = import_module("sae_lens.loading.pretrained_saes_directory")
    except ModuleNotFoundError as error:
        if error.name != "sae_lens":
            raise
        return {}
    return directory.get_pretrained_saes_directory()


def _released(entry: Any, sae_id: str | None, allow_pickle: bool) -> Parts:
    """An entry of SAELens' list. Its own layout is read here; for others its converters know many special cases."""
    if sae_id not in entry.saes_map:
        raise _unknown(f"sae_id of {entry.release}", str(sae_id), entry.saes_map)
    overrides = {**(entry.config_overrides or {}), "neuronpedia_id": entry.neuronpedia_id.get(sae_id)}
    if entry.conversion_func is None:
        folder = Folder(_download(entry.repo_id, entry.saes_map[sae_id]))
        cfg, state = read_json(folder, saelens.CONFIG), read_safetensors(folder, saelens.WEIGHTS)
    else:
        if entry.conversion_func not in WITHOUT_PICKLE and not allow_pickle:
            raise FormatError(
                f"{entry.release} is published as pickles ({entry.conversion_func}), which can hide a program: "
                "pass allow_pickle=True if you trust it"
            )
        loaders = import_module("sae_lens.loading.pretrained_sae_loaders")
        load = loaders.NAMED_PRETRAINED_SAE_LOADERS[entry.conversion_func]
        asked = {**overrides, "device": "cpu", "dtype": "float32"}
        found, state, _ = load(entry.repo_id, entry.saes_map[sae_id], device="cpu", force_download=False, cfg_overrides=asked)
        found = loaders.handle_config_defaulting(found)
        found["metadata"]["sae_lens_version"] = saelens.VERSION
        cfg = Config(found, f"{entry.release}/{sae_id}")
    cfg.update(overrides)
    parts = saelens.from_state(cfg, state)
    saelens.fold_average(parts, cfg, entry.norm_scaling_factor.get(sae_id))
    return parts


def _download(repo_id: str, folder: str | None) -> Path:
    """The files of one SAE, from the cache where they are there."""
    hub = need("huggingface_hub", "hub")
    prefix = f"{folder.strip('/')}/" if folder else ""
    names = sorted({name for format in FORMATS.values() for name in format.FILES})
    path = None
    try:
        path = Path(hub.snapshot_download(repo_id, allow_patterns=[glob.escape(prefix) + name for name in names]), prefix)
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} is not on the Hub, or closed to you: check the name, or `hf auth login`") from error
    except hub.errors.LocalEntryNotFoundError:
        pass
    if path is None or not path.is_dir() or formats.recognise(entry.name for entry in path.iterdir()) is None:
        if path is None or hub.constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
            raise FileNotFoundError(f"{folder or 'the SAE'} of {repo_id} is not in the cache, and {why}")
        files = [Path(file) for file in hub.HfApi().list_repo_files(repo_id)]
        saes = {str(file.parent) for file in files if formats.recognise([file.name])}
        if not saes:
            raise FormatError(f"{repo_id} holds no SAE of a known format: {', '.join(FORMATS)}")
        raise _unknown(f"sae_id of {repo_id}", folder or ".", saes)
    return path


def _unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    known = sorted(known)
    near = get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    return ValueError(f"{name!r} is no {what}: the nearest of {len(known)} are {', '.join(near)}")


def push_to_hub(
    sae: SAE,
    repo_id: str,
    sae_id: str | None = None,
    format: str = "saelens",
    metadata: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    private: bool = False,
) -> str:
    """Upload an SAE into the folder `sae_id` of a repository, which is made if need be; returns the commit's address.

    A model card with `metrics` is written unless the repository has one.
    """
    hub = need("huggingface_hub", "hub")
    api, sae_id = hub.HfApi(), (sae_id or "").strip("/")
    with tempfile.TemporaryDirectory() as work:
        formats.save(sae, Path(work, sae_id), format, metadata)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md"):
            card = model_card(sae, repo_id, sae_id, format, take_apart(sae, metadata).metadata, metrics or {})
            Path(work, "README.md").write_text(card, encoding="utf-8")
        commit = api.upload_folder(repo_id=repo_id, folder_path=work, commit_message=f"Upload {sae_id or 'SAE'}")
        return str(commit.commit_url)


def model_card(
    sae: SAE, repo_id: str, sae_id: str, format: str, metadata: Mapping[str, Any], metrics: Mapping[str, float]
) -> str:
    """README.md of a repository: what the SAE is, where it belongs, how it does, how to load it."""
    name = repr(repo_id) + (f", {sae_id!r}" if sae_id else "")
    facts = {
        "activation": f"{type(sae.activation).__name__}({sae.activation.extra_repr()})",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": sae.d_out,
        **{key: metadata[key] for key in ("model_name", "hook_name", "hook_name_out", "dataset_path") if key in metadata},
        **{key: f"{value:.4g}" for key, value in metrics.items()},
    }
    load = {
        "saelens": f"\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained({repo_id!r}, {sae_id!r})\n" if sae_id else "",
        "sparsify": f"\nfrom sparsify import SparseCoder\n\nsae = SparseCoder.load_from_hub({name})\n",
    }.get(format, "")
    rows = "\n".join(f"| {key} | {str(value).replace('|', '/')} |" for key, value in facts.items())
    return CARD.format(format=format, title=repo_id, rows=rows, name=name, load=load)


CARD = """---
library_name: {format}
tags:
- sparse-autoencoder
- fastsae
---
# {title}

A sparse autoencoder trained with fastsae.

| | |
|---|---|
{rows}

```python
import fastsae

sae = fastsae.from_pretrained({name})
{load}```
"""
