#!/bin/sh
# All that only a GPU can show, the models first. In the repository, with data/lfw-packed (jobs/pack_dataset.py) and
# data/photos (a folder of photographs) in it:
#
#     sh benchmarks/gpu.sh [models] [quality] [network] [restore] [training]
#
# A rehearsal on CPUs, minutes: DEVICE=cpu RESULTS=/tmp/rehearsal sh benchmarks/gpu.sh
set -eu

DEVICE=${DEVICE:-cuda}
RESULTS=${RESULTS:-benchmarks}
DOLLARS=${DOLLARS:-3.50} # an hour of the machine

if [ "$DEVICE" = cuda ]; then
    faces=48+64:150,48+64+96+128:100,48+64+128+250:80
    fast=48+64:150,48+64+128+250:80
    pixels=4194304 # of a training step: 64 photographs of 250 pixels
    sizes='48 64 128 0' validated=200 precision=bfloat16 rounds=5 epochs=4 batches='1 2 4 8 16 32 64 128'
    small=10000 large=2000 waits='16 64 256' runs=runs
else # as little as goes
    faces=16:1 fast=16:1 pixels=524288
    sizes=48 validated=4 precision=float32 rounds=1 epochs=1 batches='1 2'
    small=$((4 * $(nproc))) large=$small waits=4 runs=$RESULTS/runs
fi

models() {
    python jobs/train.py --data data/lfw-packed --storage "$runs" --name faces-gpu --preset faces --init faces \
        --schedule $faces --batch-size 64 --step-pixels $pixels --device "$DEVICE"
    python jobs/train.py --data data/lfw-packed --storage "$runs" --name faces-fast-gpu --preset faces-fast \
        --init faces-fast --schedule $fast --batch-size 64 --step-pixels $pixels --device "$DEVICE"
}

quality() { # bfloat16, then float32: what it costs
    for arithmetic in bfloat16 float32; do
        python jobs/evaluate.py --data data/lfw-packed --sizes $sizes --images $validated --device "$DEVICE" \
            --model faces "$runs/faces-gpu/model" faces-fast "$runs/faces-fast-gpu/model" \
            --precision $arithmetic --output "$RESULTS/quality-$arithmetic-$DEVICE"
    done
}

network() {
    for model in faces faces-fast; do
        python benchmarks/network_speed.py --model $model --device "$DEVICE" --precision $precision \
            --batches $batches --rounds $rounds --output "$RESULTS/network/$model-$DEVICE.json"
    done
}

restore() { # of the batch sizes the best is the one to use
    for model in faces faces-fast; do
        for size in $waits; do
            python benchmarks/restore_speed.py --photographs data/photos --corpus jpeg-250 --images $small \
                --model $model --device "$DEVICE" --precision $precision --batch-size $size --rounds $rounds \
                --dollars-per-hour "$DOLLARS" --contestants 'plain loop' 'data loader' 'codec only' 'model only' \
                --output "$RESULTS/restore/jpeg-250-$model-$size-$DEVICE.json"
        done
        python benchmarks/restore_speed.py --photographs data/photos --corpus jpeg-1024 --images $large \
            --model $model --device "$DEVICE" --precision $precision --rounds $rounds --dollars-per-hour "$DOLLARS" \
            --contestants 'plain loop' 'data loader' 'codec only' 'model only' \
            --output "$RESULTS/restore/jpeg-1024-$model-$DEVICE.json"
    done
}

training() {
    python benchmarks/training_speed.py --data data/lfw-packed --preset faces --device "$DEVICE" --epochs $epochs \
        --rounds $rounds --output "$RESULTS/training/faces-$DEVICE.json"
}

for step in ${*:-models quality network restore training}; do
    "$step"
done
