"""Multi-head self-attention in bfloat16 as one kernel of a TPU, which keeps only its input.

XLA writes the logits of all images to memory, in rows that fill half of a TPU's lanes, and turns
every array to the layouts that its products ask for. The kernel holds a few images at a time, with
logits and softmax in float32, and computes them again for the gradient (docs/performance.md).

Its arrays are laid out as XLA lays out the layers around it: tokens, images, features. So rows of
an image lie apart, and two images share the 32-bit words of bfloat16. Logits are [keys, queries]:
a TPU reduces over rows faster than over lanes.

Shapes: n tokens, b images, d width, c features of a head, l lanes, which hold 128 // c heads.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

IMAGES = 8  # held at a time: a tile of rows
_PAIRS = IMAGES // 2
LANES = 128
_MOST_TOKENS = 256  # the logits of a few heads must fit in a TPU's vector memory
_FORMAT = {"packed_dtype": jnp.bfloat16, "unpacked_dtype": jnp.float32}
Images = list[jax.Array]  # [n, l] each
Span = tuple[int, int]  # the lanes of a head


def takes(tokens: int, images: int, head_dim: int) -> bool:
    """Whether ``attend`` takes so many tokens, images on a device, and features of a head."""
    return tokens <= _MOST_TOKENS and images % IMAGES == 0 and LANES % head_dim == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(qkv: jax.Array, num_heads: int, scale: float) -> jax.Array:
    """softmax(scale q k^T) v of each head; qkv [3, n, b, d] in bfloat16 -> [n, b, d].

    For sizes that it ``takes``, on TPUs only.
    """
    return _call(_forward, [qkv], qkv.shape[1:], num_heads, scale)


def _attend_forward(qkv, num_heads, scale):
    return attend(qkv, num_heads, scale), qkv


def _attend_backward(num_heads, scale, qkv, cotangent):
    return (_call(_backward, [qkv, cotangent], qkv.shape, num_heads, scale),)


attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Callable[..., None],
    arrays: list[jax.Array],
    shape: tuple[int, ...],
    num_heads: int,
    scale: float,
) -> jax.Array:
    """An array of this shape by the kernel, which sees a few images and 128 lanes at a time."""
    n, b, d = shape[-3:]
    c = d // num_heads
    spans = [(lane, lane + c) for lane in range(0, LANES, c)]
    full, rest = divmod(d, LANES)  # the last lanes may hold fewer heads

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        parts = shape[:-3]
        index = (0,) * len(parts)
        return pl.BlockSpec((*parts, n, IMAGES, LANES), lambda i, j: (*index, 0, i, j))

    def of_block(*refs: Any) -> None:
        if full:
            pl.when(pl.program_id(1) < full)(lambda: kernel(spans, scale, *refs))
        if rest:
            pl.when(pl.program_id(1) == full)(lambda: kernel(spans[: rest // c], scale, *refs))

    call = pl.pallas_call(
        of_block,
        out_shape=jax.ShapeDtypeStruct(shape, arrays[0].dtype),
        grid=(b // IMAGES, pl.cdiv(d, LANES)),
        in_specs=[block(array.shape) for array in arrays],
        out_specs=block(shape),
        name=f"attention{kernel.__name__}",
    )
    return call(*arrays)


def _forward(spans: list[Span], scale: float, qkv: Any, out: Any) -> None:
    # All images stage by stage: the products of some heads overlap with the sums of others.
    whole = [(0, spans[-1][1])]
    q, k, v = (_load(qkv, part, spans if part == 1 else whole) for part in range(3))
    weights = _weights(q, k, spans, scale)
    outputs = [_product(_narrow(p), v[i], 0, 0) for p, (i, _) in _heads(weights, spans)]
    _store(out, 0, outputs, spans)


def _backward(spans: list[Span], scale: float, qkv: Any, cotangent: Any, out: Any) -> None:
    whole = [(0, spans[-1][1])]
    q, k, v = (_load(qkv, part, spans if part else whole) for part in range(3))
    to_out = _load(cotangent, 0, whole)
    weights = _weights(q, k, spans, scale)
    to_weights = _by_head(v, to_out, spans)
    to_logits = [_to_logits(*both, scale) for both in zip(weights, to_weights, strict=True)]
    to_q = [_product(t, x, 0, 0) for t, x in zip(to_logits, k, strict=True)]
    to_k = [_product(t, q[i], 1, 0) for t, (i, _) in _heads(to_logits, spans)]
    to_v = [_product(_narrow(p), to_out[i], 1, 0) for p, (i, _) in _heads(weights, spans)]
    for part, gradients in enumerate((to_q, to_k, to_v)):
        _store(out, part, gradients, spans)


def _heads(values: list[jax.Array], spans: list[Span]) -> Iterator[tuple[jax.Array, Any]]:
    """Each head's value with (its image, its lanes)."""
    images = range(len(values) // len(spans))
    return zip(values, [(i, span) for i in images for span in spans], strict=True)


def _weights(q: Images, k: Images, spans: list[Span], scale: float) -> list[jax.Array]:
    """softmax(scale q k^T) of each head, float32 [keys, queries]."""
    logits = _by_head(k, q, spans)
    to_base_2 = scale * math.log2(math.e)
    powers = [jnp.exp2((x - _over_rows(jnp.maximum, x)) * to_base_2) for x in logits]
    return [x * (1 / _over_rows(jnp.add, x)) for x in powers]


def _to_logits(weights: jax.Array, to_weights: jax.Array, scale: float) -> jax.Array:
    """The gradient by q k^T."""
    product = weights * to_weights
    return _narrow((product - weights * _over_rows(jnp.add, product)) * scale)


def _over_rows(combine: Any, x: jax.Array) -> jax.Array:
    """combine.reduce over axis 0, which keeps size 1.

    By tiles of 8 rows, as the compiler masks the lanes of all that it reduces.
    """
    whole = x.shape[0] // 8 * 8
    tiles = [x[row : row + 8] for row in range(0, whole, 8)]
    rows = [x[row : row + 1] for row in range(whole, x.shape[0])]
    if tiles:
        rows.append(combine.reduce(functools.reduce(combine, tiles), 0, keepdims=True))
    return functools.reduce(combine, rows)


def _by_head(a: Images, b: Images, spans: list[Span]) -> list[jax.Array]:
    """a b^T of each head, float32 [rows of a, rows of b]; a: of heads, b: of images."""
    return [_product(x, b[i], 1, 1) for x, (i, _) in _heads(a, spans)]


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product over these axes, float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    options = {"precision": lax.Precision.DEFAULT, "preferred_element_type": jnp.float32}
    return lax.dot_general(a, b, dimensions, **options)


def _narrow(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def _is_in(x: jax.Array, span: Span) -> jax.Array:
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return (lane >= span[0]) & (lane < span[1])


def _only(words: jax.Array, span: Span) -> jax.Array:
    if span == (0, LANES):
        return words
    return jnp.where(_is_in(words, span), words, jnp.uint32(0))


def _words(array: Any) -> Any:
    """A block [..., n, 8, l] of bfloat16 as words of two images each, [... n 4, l]."""
    return array.reshape(math.prod(array.shape[:-1]), LANES).bitcast(jnp.uint32)


def _rows(array: Any, part: int, pair: int) -> tuple[Any, slice]:
    """The words of two images: of the queries (part 0), of the keys (1) or of the values (2)."""
    n = array.shape[-3]
    return pl.ds(part * n * _PAIRS + pair, n, stride=_PAIRS), slice(None)


def _load(array: Any, part: int, spans: list[Span]) -> Images:
    """Each image's lanes of each span, with zeros beside them.

    So a product sums over the lanes of a head, none of which moves, at no other cost.
    """
    images = []
    for pair in range(_PAIRS):
        words = _words(array)[_rows(array, part, pair)]
        only = [_only(words, span) for span in spans]
        for index in range(2):
            images += [_narrow(pltpu.unpack_elementwise(w, index=index, **_FORMAT)) for w in only]
    return images


def _store(array: Any, part: int, values: list[jax.Array], spans: list[Span]) -> None:
    """Stores each image's lanes, each from the value of its head."""
    images: Images = []
    for value, (i, span) in _heads(values, spans):
        if i == len(images):
            images.append(value)
        else:
            images[i] = jnp.where(_is_in(value, span), value, images[i])
    for pair, both in enumerate(zip(images[::2], images[1::2], strict=True)):
        words = pltpu.pack_elementwise(both, packed_dtype=jnp.bfloat16)
        _words(array)[_rows(array, part, pair)] = words
