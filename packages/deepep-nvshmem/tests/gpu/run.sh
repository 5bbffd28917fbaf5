#!/bin/bash
# Builds the extension on a machine with GPUs and no network, checks the kernels, then measures them: run.sh [check] [measure ARGS...]
set -uo pipefail
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 PYTHONUNBUFFERED=1
here=$(cd "$(dirname "$0")" && pwd)
package=$(dirname "$(dirname "$here")")
export DEEPEP_BUILD_DIR=${DEEPEP_BUILD_DIR:-$package/build/gpu}
cmake -S "$package" -B "$DEEPEP_BUILD_DIR" -G Ninja -DCMAKE_CUDA_ARCHITECTURES=90-real -DPython_EXECUTABLE="$(command -v python3)" \
  -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" >/dev/null && ninja -C "$DEEPEP_BUILD_DIR" >"$DEEPEP_BUILD_DIR/log" 2>&1 || {
  tail -40 "$DEEPEP_BUILD_DIR/log"
  exit 1
}
cd "$here" || exit 1
while [ $# -gt 0 ]; do
  case $1 in
    check) shift; timeout 100 python3 -m pytest -q --maxfail="${MAXFAIL:-6}" -p no:cacheprovider -c /dev/null --rootdir . --confcutdir . test_kernels.py ${PYTEST_ARGS:-} 2>&1 | tail -60 ;;
    measure) shift; timeout "${MEASURE_S:-45}" python3 measure.py "$@"; break ;;
    *) echo "run.sh: '$1' is neither check nor measure"; exit 2 ;;
  esac
done
