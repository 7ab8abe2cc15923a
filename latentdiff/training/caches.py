"""What does not change during training, computed once: latents of images as distributions, embeddings of captions.

    CACHE/latents-ENCODER-PRECISION/     mean and logvar of an image in its bucket, (2, C, h, w)
    CACHE/text-ENCODER-PRECISION/        embeddings of a caption, (chunks L, width)

Every row has its own key, made of all that it depends on: a new image costs one encoding, a changed model a new folder.
Latents are kept as distributions and drawn again at every use, as without the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from latentdiff.errors import DataError, NotFiniteError
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.vae import VAE
from latentdiff.networks.weights import weights_hash
from latentdiff.training.checkpoint import check_space
from latentdiff.training.loss import encode_images, encode_tokens
from latentdiff.training.prefetch import Prefetch
from latentdiff.training.store import RowStore, row_key

_SHARD = 256
_IMAGES_AT_ONCE = 16
_TEXTS_AT_ONCE = 64

# By key: the size of an image (width, height), a function that gives it as (H, W, 3) uint8, and its name.
LatentWork = dict[str, tuple[tuple[int, int], Callable[[], np.ndarray], str]]

TYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


class LatentCache:
    """Distributions of latents by key."""

    def __init__(self, store: RowStore) -> None:
        self._store = store

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Means and logarithms of the variances, (n, 2, C, h, w) float32; all of one shape."""
        return np.stack([self._store[key] for key in keys]).astype(np.float32)

    def sample(self, keys: Sequence[str], noise: np.ndarray) -> np.ndarray:
        """Latents (n, C, h, w) float32 for standard normal noise of that shape; all of one shape."""
        rows = self.rows(keys)
        return rows[:, 0] + np.exp(0.5 * rows[:, 1]) * noise


class TextCache:
    """Embeddings of captions by their token ids."""

    def __init__(self, store: RowStore) -> None:
        self._store = store

    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """Embeddings (n, chunks L, width) float32 of token ids (n, chunks, L)."""
        return np.stack([self._store[token_key(row)] for row in tokens]).astype(np.float32)


def token_key(tokens: np.ndarray) -> str:
    """Key of a caption's token ids (chunks, L)."""
    return row_key(tokens.tolist())


def cache_latents(
    vae: VAE,
    work: LatentWork,
    cache: Path,
    precision: str,
    accelerator: Accelerator,
    threads: int,
) -> LatentCache:
    """Encode the images that are not in the cache yet; processes share the work.

    Args:
        work: see `LatentWork`.

    Raises:
        NotFiniteError: the encoder overflows; the message names the image.
        DataError: an image cannot be read, or the disk is too full.
    """
    vae.to(accelerator.device)
    store = RowStore(cache / f"latents-{encoder_hash(vae)}-{precision}")
    missing = sorted((key for key in work if key not in store), key=lambda key: work[key][0])
    per_pixel = 2 * vae.config.latent_channels * TYPES[precision].itemsize / vae.config.downscale**2
    _check_space(store, sum(work[key][0][0] * work[key][0][1] * per_pixel for key in missing))
    batches = list(_batches(missing, _IMAGES_AT_ONCE, lambda key: work[key][0]))

    def load(batch: list[str]) -> tuple[list[str], np.ndarray]:
        return batch, np.stack([work[key][1]() for key in batch])

    def encode(images: np.ndarray) -> np.ndarray:
        found = encode_images(vae, torch.from_numpy(images).to(accelerator.device))
        return torch.stack([found.mean, found.logvar], dim=1).cpu().numpy()  # (n, 2, C, h, w)

    made = ((keys, encode(images)) for keys, images in Prefetch(load, _own(batches, accelerator), workers=threads))
    _fill(
        store,
        made,
        len(missing),
        "encode images",
        precision,
        lambda key: f"the latents of {work[key][2]} are",
        accelerator,
    )
    _check_whole(store, work)
    return LatentCache(store)


def cache_text(
    text_encoder: TextEncoder, tokens: Sequence[np.ndarray], cache: Path, precision: str, accelerator: Accelerator
) -> TextCache:
    """Encode the captions (chunks, L) that are not in the cache yet; processes share the work."""
    text_encoder.to(accelerator.device)
    store = RowStore(cache / f"text-{weights_hash(text_encoder)}-{precision}")
    work = {token_key(row): row for row in tokens}
    missing = sorted((key for key in work if key not in store), key=lambda key: len(work[key]))
    per_token = text_encoder.embedding_width * TYPES[precision].itemsize
    _check_space(store, sum(work[key].size * per_token for key in missing))
    batches = list(_batches(missing, _TEXTS_AT_ONCE, lambda key: work[key].shape))

    @torch.no_grad()
    def encode(keys: list[str]) -> np.ndarray:
        rows = torch.from_numpy(np.stack([work[key] for key in keys])).to(accelerator.device)
        return encode_tokens(text_encoder, rows).float().cpu().numpy()

    made = ((keys, encode(keys)) for keys in _own(batches, accelerator))
    _fill(
        store,
        made,
        len(missing),
        "encode captions",
        precision,
        lambda key: "the embedding of a caption is",
        accelerator,
    )
    _check_whole(store, work)
    return TextCache(store)


def encoder_hash(vae: VAE) -> str:
    """Changes with everything that the latents depend on: encoder, scale factor; not with the decoder. 16 hex
    digits."""
    return weights_hash(vae, vae.config.scaling_factor, only=("encoder.", "quant_conv."))


def _batches(keys: list[str], size: int, kind_of: Callable[[str], object]) -> Iterator[list[str]]:
    """Runs of up to `size` keys of one kind, of keys that are sorted by kind."""
    start = 0
    while start < len(keys):
        kind = kind_of(keys[start])
        batch = [key for key in keys[start : start + size] if kind_of(key) == kind]
        yield batch
        start += len(batch)


def _own(batches: list[list[str]], accelerator: Accelerator) -> Iterator[list[str]]:
    return islice(batches, accelerator.process_index, None, accelerator.num_processes)


def _check_space(store: RowStore, needed: float) -> None:
    if needed:
        store.folder.mkdir(parents=True, exist_ok=True)
        check_space(store.folder, int(needed))


def _check_whole(store: RowStore, keys: Iterable[str]) -> None:
    if missing := sum(key not in store for key in keys):
        raise DataError(
            f"{missing} rows that other processes made are not in {store.folder}; the run and its `cache` must lie on storage"
            " that all machines see"
        )


def _fill(
    store: RowStore,
    made: Iterator[tuple[list[str], np.ndarray]],
    total: int,
    label: str,
    precision: str,
    name_of: Callable[[str], str],
    accelerator: Accelerator,
) -> None:
    """Write rows in shards as they are made, then take in those of the other processes."""
    keys: list[str] = []
    rows: list[np.ndarray] = []

    def write() -> None:
        if keys:
            store.write(keys, np.stack(rows))
        keys.clear()
        rows.clear()

    show = accelerator.is_main_process and total
    with tqdm(total=total // accelerator.num_processes, desc=label, leave=False, disable=not show) as bar:
        for batch, values in made:
            with np.errstate(over="ignore"):  # looked for below
                small = values.astype(TYPES[precision])
            for key, value in zip(batch, small, strict=True):
                if not np.isfinite(value).all():
                    raise NotFiniteError(f"{name_of(key)} not finite in {precision}; try cache_precision: fp32")
                if rows and (len(rows) == _SHARD or rows[0].shape != value.shape):
                    write()
                keys.append(key)
                rows.append(value)
            bar.update(len(batch))
    write()
    accelerator.wait_for_everyone()
    store.refresh()
