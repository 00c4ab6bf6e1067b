#!/usr/bin/env bash
# What to run first on a GPU: one command of at most 520 seconds, no network.
#
#     bash bench/first_gpu_run.sh [RESULTS]              RESULTS: else $OUT, else runs/first-gpu-run
#     DRY_RUN=1 bash bench/first_gpu_run.sh [RESULTS]    without a GPU: the same phases, of each what needs none
#
# PY names another Python than python3, COMMIT these sources where .git is not. Both modules come ready-built
# (`make gpu-build`). It says which one is missing, and builds _C_cuda for this GPU alone. Eight files:
#
#     RESULTS/summary.md             each phase with its seconds and its exit status, written anew after each
#     RESULTS/log.txt                what all of them printed; the probe's figures are the lines that begin with {
#     RESULTS/DEVICE/*.json, *.md    the two benches
#     RESULTS/kernels.csv, .ncu-rep  every kernel under Nsight Compute
#
# Exit status: 0 where the kernels agree with the reference (small-run and tests), else 1.
set -u # without -e: a phase that fails takes nothing from those behind it

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
dry=${DRY_RUN:-}
python=${PY:-python3}
results=${1:-${OUT:-runs/first-gpu-run}}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
log=$results/log.txt
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
head -c 1000000 /dev/zero >"$log" || exit 1 # a full disk: no result would be kept
: >"$log"
[ ! -e .git ] || checkout=$(git -c safe.directory="$PWD" describe --always --dirty 2>/dev/null)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export GRADREP_COMMIT=${COMMIT:-${GRADREP_COMMIT:-${checkout:-}}}
unset TRITON_INTERPRET GRADREP_BACKEND
[ -w "${HOME:-}" ] || export TRITON_CACHE_DIR=$scratch/triton

deadline=520 # the limits below add up to it; a build takes from the last phases
grace=5      # seconds between the request to end and the end
shown=12     # lines of each phase on the terminal
rows=()
status=0
verdict=""
about="" # versions, and who serves each op
running="" # process id of the phase

say() { printf '%s\n' "$*" | tee -a "$log"; }

write_summary() {
  {
    printf '# First run on a GPU\n\n%s\n\n' "$device"
    [ -z "$GRADREP_COMMIT" ] || printf 'Commit %s.\n\n' "$GRADREP_COMMIT"
    [ -z "$verdict" ] || printf '**%s**\n\n' "$verdict"
    printf '| phase | seconds | exit status |\n|---|---|---|\n'
    printf '%s\n' "${rows[@]}"
    [ -z "$about" ] || printf '\n~~~\n%s\n~~~\n' "$about"
  } >"$results/summary.md"
}

skip() { # NAME REASON
  say "== $1: skipped: $2"
  rows+=("| $1 | 0 | skipped: $2 |")
  write_summary
}

phase() { # NAME LIMIT COMMAND...; leaves its exit status in $status
  local name=$1 limit=$2 start=$SECONDS before
  shift 2
  ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
  if ((limit <= 2 * grace)); then
    status=124
    skip "$name" "no time is left"
    return
  fi
  say "== $name, $start s after the start, at most $limit s"
  before=$(wc -l <"$log")
  # No pipe: a process that outlives the phase would hold it open, and this script with it.
  timeout --signal=INT --kill-after="$grace" "$((limit - grace))" "$@" >>"$log" 2>&1 &
  running=$!
  wait "$running"
  status=$?
  running=""
  tail -n "+$((before + 1))" "$log" | tail -n "$shown"
  local word=$status
  [ "$status" != 124 ] && [ "$status" != 137 ] || word="$status (its time limit)"
  say "== $name: $((SECONDS - start)) s, exit status $word"
  rows+=("| $name | $((SECONDS - start)) | $word |")
  write_summary
}

stop() { # STATUS: end what runs, which timeout has put into a process group of its own
  trap '' INT TERM HUP
  [ -z "$running" ] || { kill -INT "$running" && wait "$running"; }
  say "== stopped after $SECONDS s"
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

tool() { # NAME: where a program of CUDA's is, or nothing
  command -v "$1" || compgen -G "/usr/local/cuda*/bin/$1" | tail -n 1 || compgen -G "/opt/nvidia/*/*/$1" | tail -n 1
}

# -- which GPU

nvcc=$(tool nvcc)
ncu=$(tool ncu)
if [ -n "$dry" ]; then
  device="Dry run: nothing here ran on a GPU."
  capability=9.0
  where=cpu
  bench=(--device cpu --quick --threads 1)
else
  device=$(timeout 15 nvidia-smi -i 0 --query-gpu=name,driver_version,compute_cap,clocks.max.sm,clocks.max.mem \
    --format=csv,noheader) || device="nvidia-smi does not answer"
  capability=$(timeout 15 nvidia-smi -i 0 --query-gpu=compute_cap --format=csv,noheader) || capability=9.0
  where=cuda
  bench=(--device cuda --seconds 0.5)
fi
bench+=(--results "$results")
pytest=("$python" -m pytest -p no:cacheprovider)
say "$device"

# Beside the first phases, on other cores.
if [ -n "$nvcc" ]; then
  timeout 90 "$nvcc" -std=c++17 -O3 -arch="sm_${capability/./}" -o "$scratch/probe" bench/probe.cu \
    >"$scratch/nvcc.txt" 2>&1 &
fi

# -- the phases, the most valuable first, for time may run out

# What this machine is: without it no figure below can be read. A first import of torch from a cold disk takes half a
# minute. A module that this phase had no time to load is looked for by its file, so that it is not built for nothing.
phase device 60 "$python" -m gradrep_kernels env
about=$(sed '1,2d;$d' "$log")
seen=$status
has() { # MODULE
  grep -qE "$1 is (loaded from|built)" "$log" || { [ "$seen" != 0 ] && compgen -G "gradrep_kernels/$1.*" >/dev/null; }
}
[ -n "$dry" ] || ! lacking=$(grep -oE "torch (sees no GPU|is not a CUDA build) here" "$log") ||
  say "!! ${lacking%%$'\n'*}: no kernel can run"
for module in _C _C_cuda; do
  [ -z "$dry" ] || [ "$module" = _C ] || continue
  has "$module" || say "!! gradrep_kernels.$module IS MISSING HERE: see the line 'compiled'"
done
if [ -z "$dry" ] && ! has _C_cuda; then
  phase build 150 env GRADREP_BUILD=require GRADREP_CUDA=only TORCH_CUDA_ARCH_LIST="$capability" \
    "$python" setup.py -q build_ext --inplace
fi

# Wrong kernels make every figure worthless, and this takes seconds.
phase small-run 75 "$python" bench/small_run.py "$where"
small_run=$status

# Rates that the next kernels are designed by. It needs nothing of the package, so it works where all else fails.
wait
[ ! -s "$scratch/nvcc.txt" ] || cat "$scratch/nvcc.txt" >>"$log"
[ -x "$scratch/probe" ] || { [ -x build/probe ] && cp build/probe "$scratch/probe"; }
if [ ! -x "$scratch/probe" ]; then
  skip probe "there is no nvcc that compiles it, and no build/probe"
elif [ -n "$dry" ]; then
  skip probe "compiled; it needs a GPU"
else
  phase probe 30 "$scratch/probe"
fi

# Steps and norms of every layout and alignment: what goes wrong here ends a training. A CUDA error that sticks ends
# pytest with 86 (tests/conftest.py), and the next run takes up the tests that are left.
parallel=()
if (($(nproc) >= 8)) && "$python" -c "import xdist" 2>>"$log"; then
  parallel=(-n 4 --max-worker-restart=5) # Triton compiles a kernel for each case
fi
export GRADREP_TESTS_DONE=$scratch/done
status=86
for again in "" " again" " once more"; do
  [ "$status" != 86 ] || phase "tests$again" 75 "${pytest[@]}" "${parallel[@]}" -m gpu -rfE tests/ops/test_*_step.py \
    tests/ops/test_*_grad_norm.py
  [ "$status" = 0 ] || tests_failed=1
done
unset GRADREP_TESTS_DONE
verdict="The kernels agree with the reference."
[ -z "${tests_failed:-}" ] && [ "$small_run" = 0 ] ||
  verdict="The kernels DO NOT AGREE with the reference, or this was not seen: small-run and tests"

# The step runs in every iteration of every user.
phase step 85 "${pytest[@]}" bench/bench_rep_sgd_step.py -k "host or (test_step and B1 and contiguous)" "${bench[@]}"

# Counting runs in updates of spatial gradient scaling.
phase counts 65 "${pytest[@]}" bench/bench_joint_histogram.py -k "on_gpu or data_and_layout" "${bench[@]}"

# Why the figures are what they are. The longest, and of no use without them.
sections=()
for section in SpeedOfLight MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables WarpStateStats SchedulerStats \
  InstructionStats Occupancy LaunchStats SourceCounters; do
  sections+=(--section "$section")
done
# multi_tensor is torch's fused step.
kernels="(step|hyper|tail|diagonal|norm|root|finish|gradients|extrema|ranges|numbers|histogram)_kernel|multi_tensor"
if [ -n "$dry" ]; then
  phase ncu 115 "$python" bench/profile_once.py --device cpu --quick --seconds 100
elif [ -z "$ncu" ]; then
  skip ncu "Nsight Compute is not here"
else
  phase ncu 115 "$ncu" --nvtx --profile-from-start off --clock-control none --cache-control all "${sections[@]}" \
    --kernel-name "regex:$kernels" --force-overwrite --export "$results/kernels" \
    "$python" bench/profile_once.py --seconds 70
  [ ! -s "$results/kernels.ncu-rep" ] || timeout 15 "$ncu" --import "$results/kernels.ncu-rep" --page details --csv \
    >"$results/kernels.csv" 2>>"$log"
fi

say "== the whole: $SECONDS s"
say "== $verdict"
[ -z "${tests_failed:-}" ] && [ "$small_run" = 0 ]
