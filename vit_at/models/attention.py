"""Multi-head self-attention over all tokens. Shapes: b batch, n tokens, d width, h heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_at.models import ops
from vit_at.models.layers import KERNEL_INIT, dense, param_dtype


class QueryKeyValue(nn.Module):
    """The queries of the first tokens, and the keys and values of all tokens, by linear layers.

    The features of the kernel [d, 3 d] are [q | k | v], as in timm.
    """

    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(
        self, x: jax.Array, queries: int, separately: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [b, n, d] -> q [b, queries, d], k [b, n, d], v [b, n, d].

        separately: by three products instead of slices of one, where slices would be copies.
        """
        d, weights, init = x.shape[-1], param_dtype(self.dtype), nn.initializers.zeros
        kernel = self.param("kernel", KERNEL_INIT, (d, 3 * d), weights)
        bias = self.param("bias", init, (3 * d,), weights) if self.use_bias else None

        def linear(x, features):
            factors = x.astype(self.dtype), kernel[:, features].astype(self.dtype)
            # Without the barrier, XLA merges the three products again.
            out = ops.linear(*(lax.optimization_barrier(factors) if separately else factors))
            return out if bias is None else out + bias[features].astype(self.dtype)

        if separately:
            q, k, v = (linear(x, slice(i * d, (i + 1) * d)) for i in range(3))
        elif queries == x.shape[1]:
            q, k, v = jnp.split(linear(x, slice(None)), 3, -1)
        else:
            q = linear(x[:, :queries], slice(d))
            k, v = jnp.split(linear(x, slice(d, None)), 2, -1)
        return q, k, v


class Attention(nn.Module):
    """Multi-head self-attention; the qkv features are [q | k | v], each heads x head_dim.

    The softmax runs in float32, or in float64 for float64 inputs (jax.nn's own does not).
    """

    num_heads: int
    qkv_bias: bool
    qk_scale: float  # of the attention logits; 0: head_dim ** -0.5
    dtype: str
    queries: int = 0  # the first tokens, which attend to all; 0: all tokens
    tokens: int = 0  # by one kernel of cuDNN, of all tokens to these first ones; 0: not

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d], or [b, queries, d] of the first tokens."""
        b, n, d = x.shape
        head_dim, queries = d // self.num_heads, self.queries or n
        if self.tokens:
            return self._fused(x)
        qkv = QueryKeyValue(self.qkv_bias, self.dtype, name="qkv")(x, queries)
        heads = [part.reshape(b, -1, self.num_heads, head_dim) for part in qkv]
        q, k, v = (x.transpose(0, 2, 1, 3) for x in heads)
        weights = ops.attention_weights(q, k, self.qk_scale or head_dim**-0.5)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        out = out.transpose(0, 2, 1, 3).reshape(b, queries, d)
        return dense(d, self.dtype, name="proj")(out)

    def _fused(self, x: jax.Array) -> jax.Array:
        """The same for all tokens; only q, k, v, the output and a number per row are kept."""
        b, n, d = x.shape
        parts = QueryKeyValue(self.qkv_bias, self.dtype, name="qkv")(x, n, separately=True)
        heads = [part.reshape(b, n, self.num_heads, d // self.num_heads) for part in parts]
        lengths = jnp.full((b,), self.tokens, jnp.int32) if self.tokens < n else None
        options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        scale = self.qk_scale or None
        out = jax.nn.dot_product_attention(*heads, scale=scale, implementation="cudnn", **options)
        return dense(d, self.dtype, name="proj")(out.reshape(b, n, d))
