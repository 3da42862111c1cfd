"""Multi-head self-attention over all tokens. Shapes: b batch, n tokens, d width, h heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_at.models import ops, tpu_attention
from vit_at.models.layers import KERNEL_INIT, dense, param_dtype


class QueryKeyValue(nn.Module):
    """The weights of the queries, keys and values; their features are [q | k | v], as in timm."""

    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, d: int) -> tuple[jax.Array, jax.Array | None]:
        """Kernel [d, 3 d], bias [3 d] or None, both in ``dtype``."""
        weights, init = param_dtype(self.dtype), nn.initializers.zeros
        kernel = self.param("kernel", KERNEL_INIT, (d, 3 * d), weights)
        bias = self.param("bias", init, (3 * d,), weights) if self.use_bias else None
        return jax.tree.map(lambda x: x.astype(self.dtype), (kernel, bias))


def parts(kernel: jax.Array, bias: jax.Array | None) -> list[tuple[jax.Array, jax.Array | None]]:
    """Kernel [d, d] and bias [d] or None, each of the queries, of the keys and of the values."""
    biases = [None] * 3 if bias is None else jnp.split(bias, 3)
    return list(zip(jnp.split(kernel, 3, axis=1), biases, strict=True))


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x kernel + bias in the dtype of the kernel."""
    out = ops.linear(x.astype(kernel.dtype), kernel)
    return out if bias is None else out + bias


class Attention(nn.Module):
    """Multi-head self-attention; the qkv features are [q | k | v], each heads x head_dim.

    The softmax runs in float32, or in float64 for float64 inputs (jax.nn's own does not). The
    attention weights [b, h, queries, n] are sown as 'weights', but not those of a kernel.
    """

    num_heads: int
    qkv_bias: bool
    qk_scale: float  # of the attention logits; 0: head_dim ** -0.5
    dtype: str
    queries: int = 0  # the first tokens, which attend to all; 0: all tokens
    kernel: str = ""  # of all tokens: "cudnn", "pallas" (``tpu_attention``) or "": the formula
    tokens: int = 0  # for cuDNN's: only to these first ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d], or [b, queries, d] of the first tokens."""
        d = x.shape[-1]
        qkv = QueryKeyValue(self.qkv_bias, self.dtype, name="qkv")(d)
        scale = self.qk_scale or (d // self.num_heads) ** -0.5
        attend = self._of_first if self.queries else self._of_all
        if self.kernel and not self.queries:
            attend = {"cudnn": self._by_cudnn, "pallas": self._by_pallas}[self.kernel]
        return dense(d, self.dtype, name="proj")(attend(x, *qkv, scale))

    def _of_all(self, x, kernel, bias, scale):
        b, n, d = x.shape
        features = jnp.split(project(x, kernel, bias), 3, -1)
        heads = (part.reshape(b, n, self.num_heads, -1) for part in features)
        q, k, v = (part.transpose(0, 2, 1, 3) for part in heads)
        weights = ops.attention_weights(q, k, scale)
        self.sow("intermediates", "weights", weights)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        return out.transpose(0, 2, 1, 3).reshape(b, n, d)

    def _of_first(self, x, kernel, bias, scale):
        """Of few queries, without any token's key or value, which would cost most.

        q . (K x_j) = (K^T q) . x_j, and sum_j w_j V x_j = V (sum_j w_j x_j). The keys' bias adds
        the same to each logit of a query, which the softmax ignores.
        """
        (b, n, d), h, m = x.shape, self.num_heads, self.queries
        to_query, (to_key, _), (to_value, value_bias) = parts(kernel, bias)
        to_key, to_value = (part.reshape(d, h, -1) for part in (to_key, to_value))
        x = x.astype(kernel.dtype)
        q = project(x[:, :m], *to_query).reshape(b, m, h, -1)
        q = jnp.einsum("bmhc,dhc->bhmd", q, to_key)
        pooled, weights = ops.pool(q.reshape(b, h * m, d), x, scale)
        self.sow("intermediates", "weights", weights.reshape(b, h, m, n))
        out = jnp.einsum("bhmd,dhc->bmhc", pooled.reshape(b, h, m, d), to_value)
        out = out.reshape(b, m, d)
        return out if value_bias is None else out + value_bias

    def _by_cudnn(self, x, kernel, bias, scale):
        """``_of_all``, but only q, k, v, the output and a number per row are kept."""
        b, n, d = x.shape

        def heads(kernel, bias):
            # Without the barrier, XLA merges the three products, and then its slices are copies.
            factors = lax.optimization_barrier((x.astype(kernel.dtype), kernel))
            return project(*factors, bias).reshape(b, n, self.num_heads, d // self.num_heads)

        qkv = [heads(*part) for part in parts(kernel, bias)]
        lengths = jnp.full((b,), self.tokens, jnp.int32) if self.tokens < n else None
        options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        out = jax.nn.dot_product_attention(*qkv, scale=scale, implementation="cudnn", **options)
        return out.reshape(b, n, d)

    def _by_pallas(self, x, kernel, bias, scale):
        """``_of_all``, but only q, k and v are kept. Itself, for sizes that the kernel lacks."""
        b, n, d = x.shape
        if not tpu_attention.takes(n, b, d // self.num_heads):
            return self._of_all(x, kernel, bias, scale)
        qkv = jnp.einsum("bnd,dkf->knbf", x.astype(kernel.dtype), kernel.reshape(d, 3, d))
        if bias is not None:
            qkv += bias.reshape(3, 1, 1, d)
        return tpu_attention.attend(qkv, self.num_heads, scale).transpose(1, 0, 2)
