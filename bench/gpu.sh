#!/usr/bin/env bash
# Run all measurements on one GPU, in under eight minutes, and write the results into a folder.
#
#   bench/gpu.sh OUT [MNIST-FOLDER [SECONDS]]
#
# 1. Training steps of configs/mnist.yaml, eager and compiled with CUDA graphs, for F = x and the
#    time-separable F, at two batch sizes, with tables of kernels; and of diffusers' UNet2DModel of
#    the same architecture.
# 2. With a folder of MNIST's files: a training run of configs/mnist.yaml of about SECONDS (default
#    200), and its evaluation. TRAIN_WORDS holds further options for ndm train.
# 3. The tests that need a GPU.
# A step that fails leaves its log and does not stop the others.
set -u
cd "$(dirname "$0")/.."
out=$1 mnist=${2:-} seconds=${3:-200}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=src:bench:${PYTHONPATH:-}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
export TORCHINDUCTOR_FX_GRAPH_CACHE=1
config=src/ndm/configs/mnist.yaml
dropout="--model.predictor.network.dropout 0.05"
plain="--model.transform ndm.Identity --train.optimizer adamw $dropout"
separable="--train.optimizer muon $dropout"

say() { echo "== $(date +%T) $*"; }
step() { # NAME OPTIONS...: write one table
    local name=$1
    shift
    timeout 240 $python bench/config_step.py $config --json "$out/$name.json" "$@" \
        >"$out/$name.txt" 2>&1
}

say "machine"
{ nvidia-smi; $python -c "import torch; print(torch.__version__)"; nproc; } >"$out/machine.txt" 2>&1

say "compile in parallel, so that the timed runs find everything in the cache"
step warm-plain-512 --batches 512 --modes graphs --steps 1 $plain &
step warm-separable-512 --batches 512 --modes graphs --steps 1 $separable &
step warm-plain-256 --batches 256 --modes graphs --steps 1 $plain &
step warm-separable-256 --batches 256 --modes graphs --steps 1 $separable &
wait

say "timing"
step plain-512 --batches 512 --modes eager graphs --profile $plain
step separable-512 --batches 512 --modes eager graphs --profile $separable
step plain-256 --batches 256 --modes eager graphs $plain
step separable-256 --batches 256 --modes eager graphs $separable
for name in plain-512 separable-512 plain-256 separable-256; do
    grep -E "TFLOP/s|eager|compiled|graphs|failed|Error" "$out/$name.txt" | head -n 8
done

say "diffusers' network"
step peer-256 --batches 256 --modes eager --peer $plain
tail -n 2 "$out/peer-256.txt"

if [ -n "$mnist" ]; then
    steps=$($python -c "
import json
record = json.load(open('$out/separable-256.json'))['batches'][-1]
print(int($seconds / record['seconds'] / 1.15))")
    say "training on MNIST: $steps steps"
    timeout $((seconds + 200)) $python -m ndm.cli train --config $config --data.path "$mnist" \
        --train.batch_size 256 --train.steps "$steps" --train.compile true \
        --train.checkpoint_every 100000 --out "$out/mnist" ${TRAIN_WORDS:-} >"$out/mnist.txt" 2>&1
    tail -n 8 "$out/mnist.txt" | cut -c 1-300
fi
say "tests"
timeout 150 $python -m pytest -q -p no:cacheprovider -o filterwarnings=ignore --tb=short \
    tests/train/test_gpu.py >"$out/tests.txt" 2>&1
grep -E "^E  |passed|failed" "$out/tests.txt" | head -n 12
say "done"
