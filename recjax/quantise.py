"""Codes for a catalogue by residual k-means: the simple, strong way to semantic ids, which trains nothing.

Each level clusters what the levels before left of the items' content vectors (RQ-k-means, as in GRID, arXiv
2507.22224). The learned way is the model `recjax.models.codes`, trained like any other; both end in the same artifact.
"""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from recjax.core.errors import ConfigError, DataError
from recjax.data.codes import Codes, tell_apart
from recjax.data.vocab import FIRST_ITEM, ItemVocab
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
    level; `collisions` is the size of the last level, which numbers items of the same content codes (0: none).
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
    content = codes_of(items, books, normalize=normalize)
    return tell_apart(vocab, content, size, collisions=collisions, codebooks=np.asarray(books))


def codes_of(
    vectors: Float[np.ndarray, "n d"], books: Float[np.ndarray | Array, "c w d"], *, normalize: bool = False
) -> Int[np.ndarray, "n c"]:
    """int32: the content codes of `vectors` in `books`, for instance of items that came later (`codes.extend`)."""
    run = jax.jit(lambda x, books: quantize(x, books, normalize=normalize).codes)
    blocks = [np.asarray(run(vectors[i : i + _BLOCK], books)) for i in range(0, len(vectors), _BLOCK)]
    return np.concatenate([np.zeros((0, len(books)), np.int32), *blocks])
