"""Latents of a data set, computed once and kept on disk as memory-mapped safetensors.

A cache is a folder named by a key (a hash of everything the latents depend on: pictures, tokenizer, size) with shards
of equally shaped samples and a manifest that holds the key and each shard's SHA-256. It is written whole or not at all;
what is torn, foreign or altered is computed again. Letters: B a batch, N samples.
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from smalti.core.cluster import run_all
from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, file_hash, read_json, write_json

SHARD_BYTES = 64 * 2**20
MANIFEST = "cache.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class LatentCache:
    """The latents of N samples; those of several shapes may lie in one cache.

    Args:
        shards: memory-mapped tensors (rows, ...).
        places: for each sample its shard and its row there, (N, 2) long.
    """

    def __init__(self, shards: list[Tensor], places: Tensor):
        self.shards = shards
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.shards[int(self.places[index, 0])].shape[1:])

    def __getitem__(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Latents of samples of one shape, (B, ...) float32.

        Raises:
            ValueError: the samples differ in shape.
        """
        places = self.places[torch.as_tensor(indices, dtype=torch.long, device="cpu")]
        used = places[:, 0].unique().tolist()
        shapes = {tuple(self.shards[shard].shape[1:]) for shard in used}
        if len(shapes) != 1:
            raise ValueError(f"got samples of {len(shapes)} shapes {sorted(shapes)}; a batch must have one")
        found = torch.empty(len(places), *shapes.pop(), dtype=torch.float32)
        for shard in used:
            rows = places[:, 0] == shard
            found[rows] = self.shards[shard][places[rows, 1]].float()
        return found


def cache_key(*parts: str | int | float) -> str:
    """One key for all that latents depend on, in order: `cache_key(pictures.hash, tokenizer_hash, size)`."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def build_cache(
    folder: Path | str,
    key: str,
    count: int,
    encode: Callable[[Tensor], Tensor],
    *,
    groups: Sequence[Hashable] | None = None,
    batch: int = 64,
    dtype: str = "float16",
    progress: bool = False,
    cluster: str = "",
    workers: int = 2,
) -> LatentCache:
    """Opens the cache of `key`, or makes it first; the same one, wherever its samples are encoded.

    Args:
        folder: holds the caches of all keys.
        key: of `cache_key`.
        count: number of samples N.
        encode: gives the latents (B, ...) of the samples with these indices (B,) long.
        groups: for each sample what must be equal within a call of `encode`, such as its bucket; None: all are alike.
        batch: largest B.
        dtype: "float16" or "float32" on disk.
        progress: show a progress bar.
        cluster, workers: see `core.cluster.run_all`; each worker is sent `encode` with all that it holds.

    Raises:
        UserError: the folder cannot be written, a latent is not finite in this dtype, or the cluster cannot be had.
    """
    if dtype not in DTYPES:
        raise UserError(f"cache dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if groups is not None and len(groups) != count:
        raise ValueError(f"got {len(groups)} groups for {count} samples")
    place = Path(folder) / hashlib.sha256(f"{key}:{dtype}".encode()).hexdigest()[:24]
    found = _open(place, key, count, dtype)
    if found is None:
        with atomic_folder(place) as temporary:
            writer = _Writer(temporary, DTYPES[dtype])
            with tqdm(total=count, desc="encoding", disable=not progress) as bar:
                calls, early = _calls(count, groups, batch), dict[int, Tensor]()
                written = 0
                for number, latents in run_all(lambda: _encoder(encode), calls, cluster, workers):
                    early[number] = latents
                    bar.update(len(calls[number]))
                    while written in early:  # shards are filled in the order of the samples
                        writer.add(calls[written], early.pop(written))
                        written += 1
            writer.flush()
            write_json(temporary / MANIFEST, {"key": key, "count": count, "dtype": dtype, "shards": writer.shards})
        found = _open(place, key, count, dtype)
        assert found is not None, "a cache just written is not readable"
    return found


def _encoder(encode: Callable[[Tensor], Tensor]) -> Callable[[list[int]], Tensor]:
    def work(indices: list[int]) -> Tensor:
        with torch.no_grad():
            return encode(torch.tensor(indices)).cpu()

    return work


def _calls(count: int, groups: Sequence[Hashable] | None, batch: int) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for i in range(count):
        members.setdefault(groups[i] if groups is not None else None, []).append(i)
    return [one[start : start + batch] for one in members.values() for start in range(0, len(one), batch)]


def _open(place: Path, key: str, count: int, dtype: str) -> LatentCache | None:
    """The cache, or None if it is missing, torn or another's."""
    try:
        manifest = read_json(place / MANIFEST)
        if (manifest["key"], manifest["count"], manifest["dtype"]) != (key, count, dtype):
            return None
        places = torch.full((count, 2), -1)
        shards: list[Tensor] = []
        for number, shard in enumerate(manifest["shards"]):
            if file_hash(place / shard["file"]) != shard["sha256"]:
                return None
            shards.append(load_file(place / shard["file"])["latents"])
            rows = torch.tensor(shard["samples"], dtype=torch.long)
            places[rows] = torch.stack([torch.full_like(rows, number), torch.arange(len(rows))], dim=1)
    except (UserError, OSError, SafetensorError, KeyError, TypeError, IndexError, RuntimeError):
        return None
    return LatentCache(shards, places) if (places >= 0).all() else None


class _Writer:
    """Collects samples of one shape and writes them as shards of bounded size."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.shards: list[dict] = []
        self.samples: list[int] = []
        self.parts: list[Tensor] = []

    def add(self, samples: list[int], latents: Tensor) -> None:
        if len(latents) != len(samples):
            raise ValueError(f"encode gave {len(latents)} latents for {len(samples)} samples")
        latents = latents.detach().to("cpu", self.dtype)
        if not torch.isfinite(latents).all():
            raise UserError(
                f"a latent among samples {samples[0]}..{samples[-1]} is not finite in {self.dtype}; use float32"
            )
        held = sum(part.nbytes for part in self.parts)
        if self.parts and (self.parts[0].shape[1:] != latents.shape[1:] or held + latents.nbytes > SHARD_BYTES):
            self.flush()
        self.samples += samples
        self.parts.append(latents)

    def flush(self) -> None:
        if self.parts:
            file = self.folder / f"{len(self.shards):04d}.safetensors"
            try:
                save_file({"latents": torch.cat(self.parts).contiguous()}, file)
            except SafetensorError as error:
                raise UserError(f"cannot write {file}: {error}; free some space or choose another place") from error
            self.shards.append({"file": file.name, "sha256": file_hash(file), "samples": self.samples})
            self.samples, self.parts = [], []
