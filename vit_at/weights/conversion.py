"""Converts parameters between timm's names and layouts and Flax's.

timm stores a linear weight as [out, in] and a convolution as [out, in, height, width]. Flax stores
[in, out] and [height, width, in, out]. Our models stack the parameters of blocks along axis 0; the
model's ``stacks`` lists the stacks.

Names are those of timm 0.5. The names of timm 1.x differ for Swin only: ``layers.i.downsample``
became ``layers.(i+1).downsample``, and ``head`` became ``head.fc``.
"""

import dataclasses
import re
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit_at import models
from vit_at.errors import UserError
from vit_at.models import swin
from vit_at.weights import batch_norm
from vit_at.weights.adaptation import adapt
from vit_at.weights.architecture import hint
from vit_at.weights.forms import StateDict

_LEAF_NAMES = {"kernel": "weight", "scale": "weight"}
_MODULE_NAMES = {"patch_embed": "patch_embed.proj", "patch_norm": "patch_embed.norm"}
_MODULE_NAMES |= {"head_norm": "head.norm", "head_fc": "head.fc"}
_BUFFERS = ("relative_position_index", "attn_mask")
_SHOWN = 20  # arrays of each kind of problem that an error names

_init = jax.jit(models.init_params, static_argnums=0)  # traced once for each model


def _layout(path: tuple[str, ...], value: np.ndarray, *, to_timm: bool) -> np.ndarray:
    """Transposes a kernel between Flax's and PyTorch's axes; no-op for other parameters."""
    if path[-1] != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose((3, 2, 0, 1) if to_timm else (2, 3, 1, 0))
    return value.T


def _rows(path: tuple[str, ...], model: Any) -> tuple[list[str], bool]:
    """timm's names of a Flax parameter, and whether axis 0 stacks one array for each name."""
    prefixes, rest = None, path
    for stack, names in model.stacks.items():
        parts = tuple(stack.split("/"))
        if path[: len(parts)] == parts:
            prefixes, rest = names, path[len(parts) :]
    *modules, leaf = rest
    renamed = _MODULE_NAMES | {"last_block": f"blocks.{model.depth - 1}"}
    modules = [renamed.get(m, re.sub(r"_(\d+)_?", r".\1.", m).rstrip(".")) for m in modules]
    name = ".".join([*modules, _LEAF_NAMES.get(leaf, leaf)])
    if prefixes is None:
        return [name], False
    return [f"{prefix}.{name}" for prefix in prefixes], True


def _rename_1x(name: str, step: int) -> str:
    """Renames a Swin parameter from timm 0.5 to 1.x (step 1) or back (step -1)."""
    pattern = r"(?<=^layers\.)\d+(?=\.downsample)"
    name = re.sub(pattern, lambda stage: str(int(stage[0]) + step), name)
    old, new = ("head.", "head.fc.") if step > 0 else ("head.fc.", "head.")
    return name.replace(old, new, 1) if name.startswith(old) else name


def timm_shapes(params: Any, model: Any) -> dict[str, tuple[int, ...]]:
    """{timm 0.5 name: PyTorch shape} of Flax parameters, which may be abstract."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        names, stacked = _rows(path, model)
        row = np.broadcast_to(np.zeros(()), leaf.shape[1:] if stacked else leaf.shape)
        shapes |= dict.fromkeys(names, _layout(path, row, to_timm=True).shape)
    for layer in model.batch_norms:
        names = [f"{layer}.{name}" for name in batch_norm.STATISTICS]
        shapes |= dict.fromkeys(names, shapes[f"{layer}.bias"])
    return shapes


def to_timm(params: Any, model: Any, *, names: str = "0.5", buffers: bool = False) -> StateDict:
    """The parameters under timm's names and in PyTorch's layouts.

    Args:
      names: '0.5' or '1.x', timm's version.
      buffers: adds Swin's index tables and masks. A strict ``load_state_dict`` needs them in timm
        0.5 and refuses them in timm 1.x.
    """
    state_dict = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        value = np.asarray(leaf)
        row_names, stacked = _rows(path, model)
        for name, row in zip(row_names, value if stacked else [value], strict=True):
            state_dict[name] = np.ascontiguousarray(_layout(path, row, to_timm=True))
    if isinstance(model, swin.SwinTransformer):
        if buffers:
            state_dict |= _swin_buffers(model)
        if names == "1.x":
            state_dict = {_rename_1x(name, 1): value for name, value in state_dict.items()}
    return batch_norm.unfold(state_dict, model.batch_norms)


def _swin_buffers(model: swin.SwinTransformer) -> StateDict:
    """The buffers of timm 0.5: it stores them, though the architecture determines them."""
    buffers = {}
    for i, (depth, side, window, shift) in enumerate(model.stages()):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            index = swin.relative_position_index(window)
            buffers[f"{block}.attn.relative_position_index"] = index.astype(np.int64)
            if shift and j % 2:
                mask = swin.shift_mask(side + -side % window, window, shift)
                buffers[f"{block}.attn_mask"] = mask.astype(np.float32)
    return buffers


@dataclasses.dataclass
class Report:
    """What was done with each array, under timm's names; adapted and dropped say why."""

    loaded: list[str] = dataclasses.field(default_factory=list)
    adapted: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    initialised: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"loaded       {len(self.loaded)} arrays unchanged"]
        for title, changes in (("adapted", self.adapted), ("dropped", self.dropped)):
            groups: dict[str, list[str]] = {}
            for name, what in changes.items():
                groups.setdefault(what, []).append(name)
            for what, names in groups.items():
                shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" * (len(names) > 2))
                lines.append(f"{title:12} {shown}: {what}")
        if self.initialised:
            lines.append(f"{'initialised':12} {', '.join(self.initialised)}: at random")
        return "\n".join(lines)


def from_timm(state_dict: StateDict, model: Any) -> Any:
    """Flax parameters from {timm name: array}, with names of timm 0.5 or 1.x.

    The patch kernel, the position embedding and Swin's bias tables are adapted if their shapes
    differ. The head is newly initialised if the number of classes differs. The report is printed to
    stderr unless all arrays were loaded unchanged.

    Raises:
      UserError: an array is missing, unexpected, of another shape, not floating-point or not
        finite; the message names each.
    """
    params, report = convert(state_dict, model)
    if report.adapted or report.dropped or report.initialised:
        print(report, file=sys.stderr)
    return params


def convert(state_dict: StateDict, model: Any, key: jax.Array | None = None) -> tuple[Any, Report]:
    """from_timm with a report; ``key`` initialises a new head, by default jax.random.key(0)."""
    key = jax.random.key(0) if key is None else key
    abstract = _init.eval_shape(model, key)
    shapes = timm_shapes(abstract, model)
    report = Report()
    values = {name: np.asarray(value) for name, value in state_dict.items()}
    values, new_names = _canonical(values, model)
    _drop_head(values, shapes, report)
    for name, shape in shapes.items():
        if name in values and values[name].shape != shape and _is_float(values[name]):
            with np.errstate(over="ignore"):  # _check names what is not finite
                adapted = adapt(name, values[name], shape, model.num_tokens)
            if adapted is not None:
                values[name], report.adapted[name] = adapted
    _check(values, shapes, report, new_names, model)
    report.loaded = [n for n in shapes if n in values and n not in report.adapted]
    values = batch_norm.fold(values, model.batch_norms)

    # Under jit, no parameter but the head is computed.
    flat = flax.traverse_util.flatten_dict(abstract)
    heads = sorted({p[0] for p in flat if _rows(p, model)[0][0] in report.initialised})
    init_heads = jax.jit(lambda k: [models.init_params(model, k)[head] for head in heads])
    fresh = dict(zip(heads, init_heads(key), strict=True)) if heads else {}
    params = {}
    for path, leaf in flat.items():
        names, stacked = _rows(path, model)
        if names[0] in report.initialised:
            params[path] = fresh[path[0]][path[-1]]
            continue
        rows = [_layout(path, values[name], to_timm=False) for name in names]
        params[path] = jnp.asarray(np.stack(rows) if stacked else rows[0], leaf.dtype)
    return flax.traverse_util.unflatten_dict(params), report


def _canonical(state_dict: StateDict, model: Any) -> tuple[StateDict, bool]:
    """The arrays under timm 0.5's names, without buffers; whether the names were 1.x's."""
    counters = {f"{layer}.{batch_norm.COUNTER}" for layer in model.batch_norms}
    state_dict = {name: value for name, value in state_dict.items() if name not in counters}
    if not isinstance(model, swin.SwinTransformer):
        return state_dict, False
    only_in_1x = ("head.fc.", f"layers.{swin.STAGES - 1}.downsample.")
    new_names = any(name.startswith(only_in_1x) for name in state_dict)
    if new_names:
        state_dict = {_rename_1x(name, -1): value for name, value in state_dict.items()}

    def is_buffer(name, value):
        square = value.ndim >= 2 and value.shape[-1] == value.shape[-2]
        ndim = 2 if name.endswith(_BUFFERS[0]) else 3
        return name.endswith(_BUFFERS) and square and value.ndim == ndim

    return {n: v for n, v in state_dict.items() if not is_buffer(n, v)}, new_names


def _drop_head(values: StateDict, shapes: dict[str, tuple[int, ...]], report: Report) -> None:
    """Drops heads with another number of classes, and the representation layer before them."""
    for head in ("head", "head_dist", "head.fc"):
        parts = (f"{head}.weight", f"{head}.bias")
        weight, bias, shape = values.get(parts[0]), values.get(parts[1]), shapes.get(parts[0])
        if weight is None or shape is None or weight.ndim != 2 or weight.shape == shape:
            continue
        classes = len(weight)
        if weight.shape[1] != shape[1] or bias is None or bias.shape != (classes,):
            continue
        for name in [n for n in values if n in parts or "pre_logits" in n]:
            report.dropped[name] = f"made for {classes} classes, not {shape[0]}"
            del values[name]
        report.initialised += parts


def _is_float(value: np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _is_finite(value: np.ndarray) -> bool:
    """Whether all numbers are finite in float32, the dtype of parameters."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(np.float32, copy=False)).all())


def _quoted(name: str) -> str:
    """A name of any file, without control characters and not too long to be shown."""
    return name if name.isprintable() and len(name) <= 120 else ascii(name[:120])


def _check(
    values: StateDict,
    shapes: dict[str, tuple[int, ...]],
    report: Report,
    new_names: bool,
    model: Any,
) -> None:
    """Raises a UserError that names every array that does not fit, under its name in the file."""
    if new_names:
        values = {_rename_1x(name, 1): value for name, value in values.items()}
        shapes = {_rename_1x(name, 1): shape for name, shape in shapes.items()}
    fresh = [_rename_1x(n, 1) if new_names else n for n in report.initialised]
    common = [(name, values[name], shapes[name]) for name in shapes if name in values]
    fitting = [(n, v) for n, v, s in common if v.shape == s and _is_float(v)]
    wrong = {
        "missing": [n for n in shapes if n not in values and n not in fresh],
        "unexpected": [_quoted(n) for n in values if n not in shapes],
        "misshapen": [f"{n} {v.shape} instead of {s}" for n, v, s in common if v.shape != s],
        "not floating-point": [f"{n} {v.dtype}" for n, v, _ in common if not _is_float(v)],
        "not finite": [n for n, v in fitting if not _is_finite(v)],
    }
    parts = []
    for kind, names in wrong.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{kind}: {', '.join(names[:_SHOWN])}{more}")
    if parts:
        right = hint(values, model)
        raise UserError(
            f"the weights do not fit the model ({'; '.join(parts)}); choose weights of the "
            f"architecture in model.name{'; ' * bool(right)}{right}"
        )
