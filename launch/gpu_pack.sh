#!/usr/bin/env bash
# Downloads what a GPU machine without a package index lacks, as wheels for Python 3.12 on x86-64.
#
#     launch/gpu_pack.sh DIR
#
# The machine is expected to have jax with CUDA, flax, optax, orbax-checkpoint, matplotlib, pillow,
# jinja2, pyarrow, safetensors and setuptools, and torch and timm for the comparisons. Carry DIR and
# this repository there, and run in the repository
#
#     python3 -m pip install --no-index --no-deps DIR/*.whl
#     python3 -m pip install --no-index --no-deps --no-build-isolation -e .
set -euo pipefail
dir=$1
python=${PYTHON:-python3}
packages=(
  array_record clu docstring-parser dm-tree googleapis-common-protos grain immutabledict
  importlib_resources ml_collections msgspec portpicker shtab simple-parsing tensorboardX
  tensorflow-datasets tensorflow-metadata termcolor toml
)
platforms=()
for glibc in 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)

pip=("$python" -m pip --quiet --disable-pip-version-check)

"${pip[@]}" download --no-deps --dest "$dir" --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" "${packages[@]}"
"${pip[@]}" wheel --no-deps --wheel-dir "$dir" promise  # has no wheel, and runs on any machine
du -sh "$dir"
