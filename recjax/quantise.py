"""Codes of a whole catalogue: by residual k-means, which trains nothing, or by a model of `recjax.models.codes`.

Residual k-means (RQ-k-means, as in GRID, arXiv 2507.22224) clusters what the levels before left of the items' content
vectors. It is a plain function here, and a model there; an RQ-VAE is trained like any other model. All end in the
same artifact (`recjax.data.codes`), by which items that come later are spelled without moving a code (`extend`).
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recjax.core.errors import ConfigError, DataError, UnservableError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.codes import Codes, extend, tell_apart
from recjax.data.heldout import process_rows
from recjax.data.vocab import FIRST_ITEM, PAD, ItemVocab
from recjax.models.codes import ResidualKMeans
from recjax.nn.quantize import quantize, residual_kmeans

_BLOCK = 65_536


def fit_codes(
    vocab: ItemVocab,
    vectors: Float[np.ndarray, "v d"],
    *,
    levels: int = 4,
    size: int = 256,
    collisions: int = 256,
    normalize: bool = False,
    iterations: int = 50,
    seed: int = 0,
) -> Codes:
    """Codes of every item of `vocab` by residual k-means over `vectors`, one for each row of the vocabulary.

    That is the fact `item/vectors` of a recipe (`recjax.data.features`). Rows of zeros are items without content:
    they count for no centre, and get the codes of a zero vector. `normalize` brings what is left to length 1 at every
    level; `collisions` is the size of a last level that numbers items of the same content codes; with 0 there is none
    and they are spread over other codes of the last one.
    Raises `ConfigError` for sizes that cannot be used and `DataError` for vectors that do not fit.
    """
    for name, value, least in (("levels", levels, 1), ("size", size, 2), ("iterations", iterations, 1)):
        if value < least:
            raise ConfigError(f"{name} = {value}", where="fit_codes", expected=f"at least {least}")
    if len(vectors) != vocab.num_rows or not np.isfinite(vectors).all():
        raise DataError(
            f"vectors of shape {list(vectors.shape)}",
            expected=f"finite numbers, one vector for each of the {vocab.num_rows} rows of the vocabulary",
        )
    items = np.asarray(vectors[FIRST_ITEM : FIRST_ITEM + vocab.num_items], np.float32)
    books = jax.jit(
        functools.partial(residual_kmeans, levels=levels, size=size, iterations=iterations, normalize=normalize)
    )(items, items.any(1).astype(np.float32), key=jax.random.key(seed))
    content, left = codes_of(items, books, normalize=normalize)
    return tell_apart(vocab, content, np.asarray(books), collisions=collisions, left=left)


def codes_of(
    vectors: Float[np.ndarray, "n d"], books: Float[np.ndarray | Array, "c w d"], *, normalize: bool = False
) -> tuple[Int[np.ndarray, "n c"], Float[np.ndarray, "n d"]]:
    """int32: the content codes of `vectors`, and what the levels before the last left of them.

    For items that came later this is what `codes.extend` wants.
    """

    @jax.jit
    def run(x: jax.Array, books: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = quantize(x, books, normalize=normalize)
        return found.codes, found.inputs[:, -1]

    blocks = [run(vectors[i : i + _BLOCK], books) for i in range(0, len(vectors), _BLOCK)]
    codes, left = zip(*blocks, strict=True)
    return np.concatenate(codes), np.concatenate(left)


def codes_by(
    model: Functional, params: Params, vocab: ItemVocab, *, old: Codes | None = None, mesh: Mesh | None = None
) -> Codes:
    """Codes of every item of `vocab` by a model of `recjax.models.codes`; `params` carry the facts.

    Items of `old` keep the codes they have there. Raises `UnservableError` for a model that gives no codes,
    `ConfigError` when `old` was made with other books, and `DataError` for too many collisions.
    """
    module = _module(model, params)
    content, left, _ = content_codes(model, params, vocab, mesh=mesh)
    books = np.asarray(module.codebooks[...])
    if old is None:
        return tell_apart(vocab, content, books, collisions=module.collisions, left=left)
    if old.codebooks is None or not np.array_equal(old.codebooks, books):
        raise ConfigError(
            "the codes to extend were made with other books than those of this checkpoint",
            mend="take the checkpoint that they were made with, or make new codes for all items",
        )
    return extend(old, vocab, content, left)


def content_codes(
    model: Functional, params: Params, vocab: ItemVocab, *, batch_size: int = 4096, mesh: Mesh | None = None
) -> tuple[Int[np.ndarray, "n c"], Float[np.ndarray, "n d"], float]:
    """int32 [num_items, c]: what the model gives each item.

    Beside it what the levels before the last left of it, and the share of the variance that is not reconstructed.
    """
    _module(model, params)
    parts = int(np.lcm(mesh.size_of("batch") if mesh else 1, jax.process_count()))
    size = -(-min(batch_size, vocab.num_items) // parts) * parts
    mine = process_rows(size, jax.process_index(), jax.process_count())

    @functools.partial(jax.jit, out_shardings=mesh.sharding() if mesh else None)
    def run(params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        out = model.apply(params, {"item_ids": ids}, train=False, key=None)
        content, real = out["content"], (ids != PAD)[:, None]
        missed = jnp.where(real, (content - out["reconstruction"]) ** 2, 0).sum()
        return out["codes"], out["residuals"][:, -1], jnp.stack([missed, jnp.where(real, content**2, 0).sum()])

    found, lefts, sums = [], [], np.zeros(2)
    with mesh.activate() if mesh else contextlib.nullcontext():
        for start in range(0, vocab.num_items, size):
            ids = np.full(size, PAD, np.int32)
            count = min(size, vocab.num_items - start)
            ids[:count] = FIRST_ITEM + start + np.arange(count)
            placed: Any = mesh.put_batch({"item_ids": ids[mine]})["item_ids"] if mesh else ids
            codes, left, squares = run(params, placed)
            found.append(np.asarray(codes)[:count])
            lefts.append(np.asarray(left)[:count])
            sums += np.asarray(squares)
    return np.concatenate(found), np.concatenate(lefts), float(sums[0] / max(sums[1], 1e-9))


def _module(model: Functional, params: Params) -> ResidualKMeans:
    module = model.bind(params)
    if not isinstance(module, ResidualKMeans):
        raise UnservableError(
            f"a {type(module).__name__} gives no codes", expected="a model of recjax.models.codes, such as RqVae"
        )
    return module
