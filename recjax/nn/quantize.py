"""Residual quantisation: a vector as a few codes, each a row of a book for what the codes before left over.

r_1 = x, c_l = argmin_k |r_l - e^l_k|^2, r_{l+1} = r_l - e^l_{c_l}. Distances are float32 at the highest precision of
the device: less flips codes. Books are fitted by k-means, level by level; what gradients do with them is
`recjax.models.codes`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from recjax.nn.norm import unit

_EXACT = jax.lax.Precision.HIGHEST


class Quantized(NamedTuple):
    """`codes` int32 [n, c]; `inputs` [n, c, d], r_l (normalised where asked); `chosen` [n, c, d], e^l_{c_l}."""

    codes: Int[Array, "n c"]
    inputs: Float[Array, "n c d"]
    chosen: Float[Array, "n c d"]


def squared_distances(x: Float[Array, "n d"], book: Float[Array, "w d"]) -> Float[Array, "n w"]:
    """|x_n - e_w|^2, not below 0."""
    products = jnp.matmul(x, book.T, precision=_EXACT)
    squares = (x * x).sum(1)[:, None] + (book * book).sum(1)[None]
    return jnp.maximum(squares - 2 * products, 0)


def nearest(x: Float[Array, "n d"], book: Float[Array, "w d"]) -> Int[Array, "n"]:
    """int32: the row of `book` next to each x; of several, the first."""
    return squared_distances(x, book).argmin(1).astype(jnp.int32)


def quantize(x: Float[Array, "n d"], books: Float[Array, "c w d"], *, normalize: bool = False) -> Quantized:
    """Codes of `x`, level by level; with `normalize` what is left is brought to length 1 before every level.

    What a level takes away is a constant to the levels after it: the gradient of `inputs` goes to `x` whole at every
    level, that of `chosen` to its book alone.
    """
    codes, inputs, chosen, left = [], [], [], x
    for level in range(books.shape[0]):
        left = unit(left) if normalize else left
        code = nearest(jax.lax.stop_gradient(left), books[level])
        codes.append(code)
        inputs.append(left)
        chosen.append(jnp.take(books[level], code, axis=0))
        left = left - jax.lax.stop_gradient(chosen[-1])
    return Quantized(jnp.stack(codes, 1), jnp.stack(inputs, 1), jnp.stack(chosen, 1))


def kmeans(
    x: Float[Array, "n d"], weight: Float[Array, "n"], size: int, *, key: Key[Array, ""], iterations: int = 50
) -> Float[Array, "{size} d"]:
    """Centres of `size` clusters of the rows of `x`, which count as `weight` says; deterministic in `key`.

    k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations until nothing moves or there were `iterations`.
    A cluster that loses all rows takes the row that is farthest from its centre. With fewer different rows than
    clusters, some centres are the same and never chosen.
    """
    book = _plus_plus(x, weight, size, key)

    def moved(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        step, _, is_moving = carry
        return is_moving & (step < iterations)

    def move(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        step, book, _ = carry
        new = lloyd(x, weight, book)
        return step + 1, new, jnp.any(new != book)

    return jax.lax.while_loop(moved, move, (jnp.int32(0), book, jnp.bool(True)))[1]


def lloyd(x: Float[Array, "n d"], weight: Float[Array, "n"], book: Float[Array, "w d"]) -> Float[Array, "w d"]:
    """Every centre moves to the weighted mean of its rows, an empty one to one of the rows farthest from theirs."""
    distances = squared_distances(x, book)
    code, size = distances.argmin(1), book.shape[0]
    count = jax.ops.segment_sum(weight, code, size)
    total = jax.ops.segment_sum(x * weight[:, None], code, size)
    mean = total / jnp.maximum(count, 1e-9)[:, None]
    lost = jnp.where(weight > 0, distances.min(1), 0)
    most, far = jax.lax.top_k(lost, min(size, x.shape[0]))
    turn = jnp.cumsum(count == 0) - 1  # the how manieth empty centre
    turn = jnp.clip(turn, 0, len(far) - 1)
    moves = (count == 0) & (most[turn] > 0)
    kept = jnp.where((count > 0)[:, None], mean, book)
    return jnp.where(moves[:, None], x[far[turn]], kept)


def residual_kmeans(
    x: Float[Array, "n d"],
    weight: Float[Array, "n"],
    *,
    levels: int,
    size: int,
    key: Key[Array, ""],
    iterations: int = 50,
    normalize: bool = False,
) -> Float[Array, "{levels} {size} d"]:
    """Books of k-means over what is left at each level, the first level first."""
    books, left = [], x
    for level_key in jax.random.split(key, levels):
        left = unit(left) if normalize else left
        books.append(kmeans(left, weight, size, key=level_key, iterations=iterations))
        left = left - jnp.take(books[-1], nearest(left, books[-1]), axis=0)
    return jnp.stack(books)


def _plus_plus(x: jax.Array, weight: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """Rows drawn one after another; the chance of each is its weight times its squared distance from the nearest."""
    keys = jax.random.split(key, size)
    first = x[jax.random.categorical(keys[0], jnp.log(weight))]

    def step(carry: tuple[jax.Array, jax.Array], draw_key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        closest, last = carry
        closest = jnp.minimum(closest, ((x - last[None]) ** 2).sum(1))
        row = x[jax.random.categorical(draw_key, jnp.log(weight * closest))]
        return (closest, row), row

    start = (jnp.full(x.shape[:1], jnp.inf, x.dtype), first)
    _, rest = jax.lax.scan(step, start, keys[1:])
    return jnp.concatenate([first[None], rest])
