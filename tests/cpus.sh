#!/usr/bin/env bash
# Numerical tests on other CPUs than this one, played: without vector instructions and with fewer, by other routines for
# products, with several threads. Takes about a minute on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

play() {
  local cpu="$1"
  shift
  echo "+ $cpu"
  env $cpu pytest -q -n auto "${@/#/tests/test_}"
}

play "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1" \
  families.py runtime.py sweep.py methods.py probes.py analyze.py
play "ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=4 OMP_WAIT_POLICY=PASSIVE" \
  runtime.py runtime_schedules.py sweep.py
