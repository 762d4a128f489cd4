#!/usr/bin/env bash
# All that is worth the minutes of a GPU, in order of worth. Each stage ends with files of its own in OUT, so that time may run out.
#   benchmarks/gpu.sh SECONDS DATA OUT
# SECONDS is the time for everything, DATA the folder of MNIST, Fashion-MNIST and CelebA. A stage that is out of time is stopped by
# SIGTERM, which writes checkpoints, and what has ended is packed. The same command goes on with what is unfinished.
# With REHEARSE=1 every stage runs at tiny sizes on drawn digits on a CPU; a test does this.
set -u
seconds=$1 data=$(realpath "$2") out=$(mkdir -p "$3" && cd "$3" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root VSM_CACHE=${VSM_CACHE:-$out/cache}  # one feature network for all stages
cd "$out" || exit 2
began=$SECONDS failed=0

left() { echo $((seconds - (SECONDS - began))); }

limited() {  # limited SHARE COMMAND...: run COMMAND for at most SHARE per cent of all the time, and of what is left
    local most=$((seconds * $1 / 100)) rest=$(($(left) - 5))
    shift
    [ $rest -lt $most ] && most=$rest
    [ $most -lt 3 ] && { echo "no time left for: $*"; return 1; }
    timeout --signal=TERM --kill-after=30 "$most" "$@"
}

study() {  # study NAME SHARE FLAGS...: train all combinations of FLAGS in the folder NAME, evaluate and pack what has ended
    local name=$1 share=$2
    shift 2
    mkdir -p "$name"
    (cd "$name" && limited "$share" python "$root/train_images.py" --data-root "$data" $size "$@") || failed=1
    pack "$name"
}

pack() {
    ls "$1"/runs/images/*/metrics.npz >/dev/null 2>&1 || return
    (cd "$1" && limited 8 python "$root/evaluate.py" runs/images/* --data-root "$data" --images 20 --iw-samples 10 $samplers)
    python -m studies.packs "$1"/runs/images/* --save "$1.npz" && echo "packed $1.npz, $(left) s left"
}

samplers="--sampler prior mixture"
if [ -n "${REHEARSE:-}" ]; then
    digits="--data glyphs" fashion=$digits faces=$digits width=4 wide=8 seeds="0"
    size="--limit 100 --test-limit 40 --dim-z 4 --samples 2 --batch 20 --epochs 1 --device cpu --jobs 2" short="" cpu="--device cpu"
    steps="--sizes 1 2 --width 4 --samples 1 --inner-steps 1 --batch 4 --seconds 0.1"
    kinds="eager grouped" arithmetic="float32" tests="tests/test_cuda.py -k capture"
else
    digits="--data mnist" fashion="--data fashion" faces="--data celeba" width=64 wide=64 seeds="0 1 2"
    size="--test-limit 2000 --samples 5 --batch 100 --lr 2e-3 --lr-half-life 3 --epochs 12 --eval-every 2 --precision tf32"
    short="--lr-half-life 6 --epochs 24 --dim-z 32" cpu=""
    steps="--sizes 1 4 8 --seconds 2"
    kinds="eager compiled contiguous grouped" arithmetic="tf32 bf16" tests="tests/test_cuda.py"
fi
k1="--inner-steps 1 --infer-samples 1"

(cd "$root" && limited 12 python -m pytest -q -p no:cacheprovider $tests) >tests.txt 2>&1
tail -n 1 tests.txt
for networks in $kinds; do
    limited 4 python -m benchmarks.lockstep $steps --precision $arithmetic --networks $networks $cpu --save "lockstep_$networks.md" || failed=1
done
dsm="--learn dsm --estimator unbiased"
study mnist 18 $digits --width $width $k1 --learn elbo fd swersky bao --seed $seeds
study mnist_dsm 5 $digits --width $width $k1 $dsm --seed $seeds
study mnist_fd 10 $digits --width $width $k1 --infer fd --learn fd swersky bao --seed $seeds
study gamma_fixed 10 $digits --width $width $k1 --gamma fixed --init-sd 0.368 0.223 0.135 --learn elbo swersky bao
study gamma_fixed_dsm 4 $digits --width $width $k1 --gamma fixed --init-sd 0.368 0.223 0.135 $dsm
study gamma_stationary 6 $digits --width $width $k1 --gamma stationary --learn elbo swersky bao
study celeba 12 $faces $short --width $wide $k1 --learn elbo fd swersky bao
study celeba_dsm 4 $faces $short --width $wide $k1 $dsm
study fashion 10 $fashion --width $width $k1 --learn elbo fd swersky bao
study resnet 10 $digits --net resnet --width $wide $k1 --learn elbo fd swersky bao
study resnet_fd 6 $digits --net resnet --width $wide $k1 --infer fd --learn fd swersky bao
echo "done after $((SECONDS - began)) s"
exit $failed
