#!/usr/bin/env bash
# All that only a GPU can say, in one command:  bash bench/gpu.sh [OUT_DIR] [--dry-run]
#
# Needs this checkout and a python3 with torch, triton, numpy, safetensors, pytest and hypothesis; no network. Writes at most
# six files into OUT_DIR (default bench/results), each part under its own time limit and saving as it goes, and ends by itself
# within GPU_MINUTES (default 9). Peers are measured too if python3 can import them: put a folder of wheels on PYTHONPATH.
# In a copy without .git, FASTSAE_COMMIT says which commit it is. --dry-run runs every part at tiny sizes on a CPU. The
# answers land in docs/gpu.md with `python3 -m bench.report`.
set -uo pipefail

dry=""
out=""
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry=1 ;;
    -*) echo "usage: bash bench/gpu.sh [OUT_DIR] [--dry-run]" >&2; exit 2 ;;
    *) out="$argument" ;;
  esac
done
root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "${out:=$root/bench/results}" && out="$(cd "$out" && pwd)" || exit 1
cd "$root" || exit 1
python="${PYTHON:-python3}"
total=$((${GPU_MINUTES:-9} * 60))
status="$out/gpu-status.txt"
log="$out/gpu-log.txt"
export PYTHONUNBUFFERED=1 WANDB_MODE=disabled HF_HUB_OFFLINE=1 FASTSAE_EXAMPLES="${FASTSAE_EXAMPLES:-25}"
unset TRITON_INTERPRET

SECONDS=0
reserve=20  # for what is killed to end, and for the table
echo "commit ${FASTSAE_COMMIT:-$(git rev-parse HEAD 2> /dev/null || echo unknown)}, $(date -u '+%Y-%m-%d %H:%M') UTC, ${total} s in all" > "$status"
: > "$log"

# part NAME SECONDS FILE COMMAND...: run it, its output into FILE, stopped after SECONDS or when the time in all runs out
part() {
  local name="$1" limit="$2" file="$3" left=$((total - SECONDS - reserve)) began=$SECONDS code=0
  shift 3
  if [ "$left" -lt 5 ]; then
    echo "$name: not started, out of time" | tee -a "$status"
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  timeout -k 8 "$limit" "$@" >> "$file" 2>&1 || code=$?
  local said="exit $code"
  [ "$code" = 0 ] && said="ok"
  [ "$code" = 124 ] || [ "$code" = 137 ] && said="stopped at its limit; what it had saved is kept"
  echo "$name: $said, $((SECONDS - began)) s" | tee -a "$status"
}

cuda="$("$python" -c 'import torch; print(int(torch.cuda.is_available()))' 2>> "$log")"
if [ "$cuda" != 1 ] && [ -z "$dry" ]; then
  echo "no GPU is visible to torch: nothing was measured (--dry-run goes through all parts on a CPU)" | tee -a "$status"
  exit 0
fi
if [ -n "$dry" ]; then
  tests=(tests/kernels/test_decode.py -k "torch and not gradients")
  questions=(--tiny)
  peers=(--smoke --cases step/TopK)
else
  tests=(tests/kernels)
  questions=()
  peers=(--shapes S M F --cases step encode/TopK forward/TopK/N=1 decode shards save load --seconds 2
    # all but torch.compile, which compiles longer than this part lasts
    --only fastsae "fastsae FusedAdam" "fastsae FusedAdam bf16 moments" "fastsae tile maxima" sae-lens dictionary-learning
    sparsify "dense torch" "encoder GEMM" "safetensors alone")
fi
workers=()
"$python" -c 'import xdist' 2> /dev/null && [ -z "$dry" ] && workers=(-n 8)

part "kernel tests" 150 "$out/gpu-tests.txt" "$python" -m pytest -q -o addopts=--import-mode=importlib \
  -p no:cacheprovider "${workers[@]}" "${tests[@]}"
part "ceilings and questions" 240 "$log" "$python" -m bench.questions --out "$out/gpu-questions.json" --seconds 225 "${questions[@]}"
name="$("$python" -c 'import torch; from bench.environment import slug; print(slug(torch.device("cuda" if torch.cuda.is_available() else "cpu")))' 2>> "$log")"
part "peers" 100 "$log" "$python" -m bench "${peers[@]}" --out "$out/${name:-device}.json"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 60 "$out/gpu-sanitizer.txt" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.workloads
  done
elif [ -n "$dry" ]; then
  part "small shapes" 60 "$out/gpu-sanitizer.txt" "$python" -m bench.workloads
else
  echo "compute-sanitizer: not installed" | tee -a "$status"
fi

echo
cat "$status"
"$python" -m bench.questions --show "$out/gpu-questions.json" 2>> "$log"
grep -E '^(case |step/|encode/|forward/|decode/|shards |save |load )' "$log" | cut -c1-120 | tail -40
exit 0
