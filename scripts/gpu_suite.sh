#!/usr/bin/env bash
# Everything marked gpu, on a machine that may have no network: packages are built from this tree with the Python and
# the nvcc at hand, and installed into build/gpu-suite, which leaves that Python's own packages alone.
#
#   scripts/gpu_suite.sh [arguments for pytest]
#
# PYTHON names the interpreter (python3); it needs torch, numpy, pytest and hypothesis, and for kernel packages
# scikit-build-core, pybind11, cmake and ninja. Small wheels of pure Python that it lacks (stevedore, hatchling) are taken
# from wheelhouse/, which `nox -s wheelhouse` fills on a machine with a network.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
target=$PWD/build/gpu-suite
rm -rf "$target"
mkdir -p "$target"
export PYTHONPATH="$target${PYTHONPATH:+:$PYTHONPATH}"
install=("$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target")

shopt -s nullglob
wheels=(wheelhouse/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    "${install[@]}" --no-index "${wheels[@]}"
fi

packages=(packages/deepep-core packages/deepep-reference)
if command -v nvcc >/dev/null; then
    for native in packages/deepep-nvshmem packages/deepep-ibgda; do
        [ -f "$native/pyproject.toml" ] && packages+=("$native")
    done
else
    echo "no nvcc here: kernel packages are left out" >&2
fi
# One call each: a failing build names its package.
for package in "${packages[@]}"; do
    echo "+ install $package"
    "${install[@]}" --no-index --no-build-isolation "./$package"
done

"$python" - <<'PY'
import torch

import deep_ep
from deep_ep import registry

print(f"deep_ep {deep_ep.__version__}, torch {torch.__version__}, {torch.cuda.device_count()} GPUs,",
      f"backends: {', '.join(registry.installed_names())}")
PY
exec "$python" -m pytest -m gpu "$@"
