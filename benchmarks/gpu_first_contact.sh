#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The first visit to a GPU, so that none of its minutes are spent typing: one command runs
# everything, each step under a time limit and with a log of its own.
#
#   benchmarks/gpu_first_contact.sh OUT [OPTION...]
#
# OUT is a folder, made where it is missing, for OUT/summary.txt, OUT/STEP.log and what else a step
# writes.
#
#   --only A,B           these steps alone
#   --budget SECONDS     leave out each step that may end after so many seconds of the whole
#   --limit STEP=SECONDS instead of the step's own; may be repeated
#   --python FILE        instead of the first Python on the PATH that has PyTorch
#   --wheels FOLDER      install all its wheels into OUT/site: one version of each, for that Python
#   --archive FILE       a .tar.gz of OUT, written anew after each step
#   --rehearse           hide every GPU: each step goes as far as it can, and must then say "no GPU"
#
# The steps, in their order, and the seconds that each may take:
#   install   150  what FOLDER has; fastattn, from there or built; what is missing, in one line
#   machine    30  the GPU, the driver, versions
#   agree      60  tests of mma on the GPU up to the first failure: do emulator and chip agree?
#   hardware  120  all tests of calls on the GPU
#   memcheck, racecheck, synccheck
#              60  a small call of each kernel, forward and backward, under compute-sanitizer
#   bench     180  fastattn bench --device cuda, for OUT/bench.json
#   ncu        60  mma and wgmma, 8k tokens, under Nsight Compute, for OUT/ncu_*.ncu-rep
#   cpu        90  the CPU of that machine with 1 to 16 threads, for OUT/cpu_*.json
#
# Nothing is fetched from a network. A step that fails does not stop the next. The exit status is 1
# if any step failed or ran out of time. A first visit and, once its logs were read, a second:
#   benchmarks/gpu_first_contact.sh first --wheels wheels --budget 540 \
#     --only install,machine,agree,hardware,memcheck,racecheck,synccheck,cpu
#   benchmarks/gpu_first_contact.sh second --wheels wheels --budget 540 --only install,bench,ncu
# shellcheck disable=SC2329  # functions are called by name
set -u

steps=(install machine agree hardware memcheck racecheck synccheck bench ncu cpu)
declare -A limit=(
  [install]=150 [machine]=30 [agree]=60 [hardware]=120 [memcheck]=60 [racecheck]=60 [synccheck]=60
  [bench]=180 [ncu]=60 [cpu]=90
)
on_cpu=(install cpu)
grace=10 # seconds from the signal that asks a step to end to the one that ends it

# ---- The steps. Each runs in a bash of its own, at the root of the checkout.

step_install() {
  if [[ -n $wheels ]]; then
    "$python" -m pip install --no-index --no-deps --no-compile --upgrade --target "$out/site" \
      "$wheels"/*.whl
    # Of a folder on PYTHONPATH Python reads no .pth files, and numba-cuda has one.
    echo 'import os, site; site.addsitedir(os.path.dirname(__file__))' \
      > "$out/site/sitecustomize.py"
  fi
  if ! "$python" -c 'import fastattn'; then
    # A build folder of its own: the checkout's may be of another Python.
    "$python" -m pip install --no-index --no-deps --no-build-isolation --no-compile --upgrade \
      --target "$out/site" --config-settings "build-dir=$out/build" .
  fi
  "$python" - << 'END'
import importlib
import sys

missing = []
for module, package in {
    "fastattn": "fastattn (a wheel; or scikit-build-core, pybind11, CMake and a C++ compiler)",
    "torch": "torch",
    "numba": "numba",
    "numba_cuda": "numba-cuda",
    "cuda.bindings.driver": "cuda-bindings",
    "ml_dtypes": "ml_dtypes",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
}.items():
    try:
        found = importlib.import_module(module)
        print(module, getattr(found, "__version__", ""), getattr(found, "__file__", ""))
    except ImportError:
        missing.append(package)
try:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    print("libnvvm", load_nvidia_dynamic_lib("nvvm").abs_path)
except Exception as error:
    print(type(error).__name__, error)
    missing.append("libnvvm (nvidia-nvvm)")
try:
    from fastattn.cuda._build import assemblers

    print("ptxas", *assemblers())
    if not assemblers():
        missing.append("ptxas (nvidia-cuda-nvcc)")
except ImportError:
    pass
sys.exit("missing: " + ", ".join(missing) if missing else 0)
END
}

step_machine() {
  if command -v nvidia-smi; then
    nvidia-smi
  fi
  "$python" - << 'END'
import importlib.metadata
import sys

import torch

import fastattn
import fastattn.cuda

for name in ("torch", "triton", "numpy", "numba", "numba-cuda", "llvmlite", "cuda-bindings"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "-")
print(fastattn.info())
if not torch.cuda.is_available():
    sys.exit(f"no GPU: PyTorch {torch.__version__}, for CUDA {torch.version.cuda}, sees none")
print(torch.cuda.get_device_properties(0))
sys.exit(0 if fastattn.cuda.is_available() else "fastattn.cuda cannot use the GPU of PyTorch")
END
}

# Warnings are no errors here: other versions of packages warn of other things.
step_agree() { tests -k "(96 or 256) and not cpu" -x; }
step_hardware() { tests -k "not cpu"; }
tests() { "$python" -m pytest -W default -p no:cacheprovider tests/cuda/test_hardware.py "$@"; }

step_memcheck() { sanitized memcheck; }
step_racecheck() { sanitized racecheck; }
step_synccheck() { sanitized synccheck; }
sanitized() {
  local kernel failed=0 watch=(
    # What it does not know as PyTorch's it watches: a wrong name here costs time and hides nothing.
    compute-sanitizer --tool "$1" --error-exitcode 9
    --kernel-name-exclude kernel_substring=at6native
  )
  [[ -z $rehearse ]] || watch=() # without a driver it starts no program
  for kernel in wgmma mma decode simt; do # a process for each: an error ends what follows in it
    "${watch[@]}" "$python" benchmarks/cuda_kernels.py --call "$kernel" || failed=$?
  done
  return "$failed"
}

step_bench() { "$python" -m fastattn bench --device cuda --json "$out/bench.json"; }

step_ncu() {
  local kernel watch failed=0
  for kernel in mma wgmma; do
    watch=(
      ncu --force-overwrite --export "$out/ncu_$kernel" --clock-control none --set full
      --kernel-name regex:fastattn_ --launch-count 1
    )
    [[ -z $rehearse ]] || watch=()
    "${watch[@]}" "$python" benchmarks/cuda_kernels.py --call "$kernel" --tokens 8192 \
      --head-dim 128 --forward || failed=$?
    # Fails where no kernel was measured.
    [[ -n $rehearse ]] || ncu --import "$out/ncu_$kernel.ncu-rep" --page details || failed=$?
  done
  return "$failed"
}

step_cpu() {
  local threads case cases=() failed=0
  for case in f32-2k-d128 f32-4k-d128-causal bf16-2k-d128 decode-32k-gqa backward-f32-2k-d128; do
    cases+=(--case "$case")
  done
  [[ -z $rehearse ]] || cases=(--case f32-2k-d128)
  for threads in 16 8 4 2 1; do
    ((threads <= $(nproc))) || continue
    "$python" -m fastattn bench --quick --libraries fastattn --threads "$threads" "${cases[@]}" \
      --json "$out/cpu_$threads.json" || failed=$?
  done
  return "$failed"
}

# ---- What runs them

complain() {
  echo "gpu_first_contact.sh: $1" >&2
  exit 2
}

# Whether a word is among others.
among() {
  local word
  for word in "${@:2}"; do
    [[ $word != "$1" ]] || return 0
  done
  return 1
}

out='' only='' budget=0 python='' wheels='' archive='' rehearse=''
while (($#)); do
  case $1 in
    --rehearse) rehearse=yes ;;
    -h | --help)
      sed -n '3,/^set -u/{/^set -u/d;/^# shellcheck/d;s/^# \?//;p}' "$0"
      exit
      ;;
    --only | --budget | --limit | --python | --wheels | --archive)
      (($# > 1)) || complain "$1 needs a value"
      case $1 in
        --only) only=${2//,/ } ;;
        --budget) budget=$2 ;;
        --limit)
          among "${2%%=*}" "${steps[@]}" || complain "--limit: no step ${2%%=*} in: ${steps[*]}"
          limit[${2%%=*}]=${2#*=}
          ;;
        --python) python=$2 ;;
        --wheels) wheels=$(realpath -m "$2") ;;
        --archive) archive=$(realpath -m "$2") ;;
      esac
      shift
      ;;
    -*) complain "no option $1: --help names them" ;;
    *)
      [[ -z $out ]] || complain "one folder OUT, got $out and $1"
      out=$(realpath -m "$1")
      ;;
  esac
  shift
done
[[ -n $out ]] || complain "it needs a folder OUT: --help says more"
for seconds in "$budget" "${limit[@]}"; do
  [[ $seconds =~ ^[0-9]+$ ]] || complain "--budget and --limit take whole seconds, got '$seconds'"
done
for step in $only; do
  among "$step" "${steps[@]}" || complain "--only: no step $step in: ${steps[*]}"
done
[[ -z $wheels || -d $wheels ]] || complain "--wheels: there is no folder $wheels"

# Print the path of the first Python that is new enough; of those, rather one with PyTorch.
find_python() {
  local name path plain=''
  for name in python3 python python3.1{1..9}; do
    path=$(command -v "$name") || continue
    "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
    plain=${plain:-$path}
    if "$path" -c 'import sys, importlib.util as x; sys.exit(not x.find_spec("torch"))'; then
      echo "$path"
      return
    fi
  done
  echo "$plain"
}

python=${python:-$(find_python)}
command -v "$python" > /dev/null || complain "no Python of at least 3.11 here: --python names one"
mkdir -p "$out" || exit 2
cd "$(dirname "$0")/.." || exit 2
[[ -z $rehearse ]] || export CUDA_VISIBLE_DEVICES=
export out python wheels rehearse
export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export FASTATTN_CACHE_DIR="$out/cache" # what a step has compiled, the next loads
# cuda-pathfinder does not look for libnvvm and libdevice on PYTHONPATH.
if [[ -n $wheels ]] && compgen -G "$wheels/nvidia_nvvm-*.whl" > /dev/null; then
  carried="$out/site/nvidia/cu13"
  export CUDA_PATH="$carried" CUDA_HOME="$carried"
  export LD_LIBRARY_PATH="$carried/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
while read -r name; do
  export -f "${name?}"
done < <(compgen -A function | grep -E '^(step_.*|tests|sanitized)$')

# Print what came of a step: as it should be are "ok" and, in a rehearsal, "no GPU".
outcome() { # STEP STATUS SECONDS
  local last
  last=$(grep -av '^+' "$out/$1.log" | grep -a . | tail -n 1 | cut -c 1-150)
  if (($2 == 124 || ($2 == 137 && $3 >= limit[$1]))); then
    echo "timed out"
  elif ! among "$1" "${on_cpu[@]}" && grep -aqE "no GPU|built for CUDA" "$out/$1.log"; then
    if [[ -n $rehearse ]]; then echo "no GPU"; else echo "failed: $last"; fi
  elif (($2)); then
    echo "failed ($2): $last"
  elif [[ -n $rehearse ]] && ! among "$1" "${on_cpu[@]}"; then
    echo "failed: it does not say that there is no GPU"
  else
    echo "ok"
  fi
}

say() { echo "$1" | tee -a "$out/summary.txt"; }

keep() { # what there is so far, for a machine that gives back few files, or is taken away
  [[ -n $archive ]] || return
  tar -czf "$archive.new" --exclude="${out##*/}/site" --exclude="${out##*/}/build" \
    -C "$(dirname "$out")" "${out##*/}" && mv "$archive.new" "$archive"
}

finish() {
  say "$done_well of $chosen steps as they should be, in $SECONDS s${bad[*]:+; not: ${bad[*]}}"
  keep
  ((done_well == chosen))
  exit
}

stop() { # by Ctrl-C, or whoever ends this script
  kill -INT "$running" 2> /dev/null
  wait "$running"
  bad+=("interrupted")
  finish
}

running='' chosen=0 done_well=0 bad=()
trap stop INT TERM
: > "$out/summary.txt"
say "$("$python" --version) at $(command -v "$python")${rehearse:+, rehearsed without a GPU}"
for step in "${steps[@]}"; do
  # shellcheck disable=SC2086  # words
  [[ -z $only ]] || among "$step" $only || continue
  chosen=$((chosen + 1))
  needed=$((limit[$step] + grace)) left=$((budget - SECONDS))
  if ((budget && needed > left)); then
    seconds=0 said="skipped: it may take $needed s, $left s are left"
  else
    begin=$SECONDS
    # Job control, for else what runs in the background would not hear SIGINT. Python ends by it
    # with what it has: pytest tells of the tests so far, fastattn bench keeps what it measured.
    set -m
    timeout --signal=INT --kill-after="$grace" "${limit[$step]}" \
      bash -c "set -u; trap 'exit 130' INT; set -x; step_$step" \
      < /dev/null > "$out/$step.log" 2>&1 &
    running=$!
    set +m
    wait "$running" 2> /dev/null # where bash would say that it was killed
    status=$?
    seconds=$((SECONDS - begin))
    said=$(outcome "$step" "$status" "$seconds")
    echo "--- $said, after $seconds s" >> "$out/$step.log"
  fi
  say "$(printf '%-10s %4d s  %s' "$step" "$seconds" "$said")"
  case $said in
    ok | "no GPU") done_well=$((done_well + 1)) ;;
    *) bad+=("$step") ;;
  esac
  keep
done
finish
