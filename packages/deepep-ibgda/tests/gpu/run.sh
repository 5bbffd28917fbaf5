#!/bin/bash
# Checks the kernels, then measures them: run.sh [check] [measure ARGS...]. Builds the extension unless an installed package is on PYTHONPATH;
# with DEEPEP_LL_TRACE=1 it builds one that keeps clocks, for `measure --trace`.
set -uo pipefail
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 PYTHONUNBUFFERED=1
here=$(cd "$(dirname "$0")" && pwd)
package=$(dirname "$(dirname "$here")")
if [ -n "${DEEPEP_LL_TRACE:-}" ] || ! python3 -c "from deepep_ibgda import _ibgda" 2>/dev/null; then
  export DEEPEP_BUILD_DIR=${DEEPEP_BUILD_DIR:-$package/build/gpu${DEEPEP_LL_TRACE:+-trace}}
  mkdir -p "$DEEPEP_BUILD_DIR"
  cmake -S "$package" -B "$DEEPEP_BUILD_DIR" -G Ninja -DCMAKE_CUDA_ARCHITECTURES=90-real -DPython_EXECUTABLE="$(command -v python3)" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" >"$DEEPEP_BUILD_DIR/log" 2>&1 && ninja -C "$DEEPEP_BUILD_DIR" >>"$DEEPEP_BUILD_DIR/log" 2>&1 || {
    tail -40 "$DEEPEP_BUILD_DIR/log"
    exit 1
  }
fi
cd "$here" || exit 1
status=0
while [ $# -gt 0 ]; do
  case $1 in
    check) shift; timeout "${CHECK_S:-200}" python3 -m pytest -q --maxfail="${MAXFAIL:-6}" -p no:cacheprovider -c /dev/null --rootdir . --confcutdir . test_kernels.py ${PYTEST_ARGS:-} 2>&1 | tail -60 || status=$? ;;
    measure) shift; timeout "${MEASURE_S:-90}" python3 measure.py "$@" || status=$?; break ;;
    *) echo "run.sh: '$1' is neither check nor measure"; exit 2 ;;
  esac
done
exit "$status"
