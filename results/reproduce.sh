#!/usr/bin/env bash
# The command of every published run, in parts named after figures, tables and packs. `results/reproduce.sh PART` runs one part,
# `results/reproduce.sh PART -n` prints its commands, one a line, for xargs, GNU parallel or a Slurm array (docs/machines.md).
# Runs resume and finished ones are skipped. Times are those of training on one core of a CPU.
# Set DATA to the folder of MNIST, Fashion-MNIST and CelebA. --compile needs a C++ compiler; without it a run takes 1.7 times as long.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data}
if [ "${2:-}" = -n ]; then set -f; python() { echo "python $*"; }; fi

figure1() {  # Figure 1 and every rule: 1 min
    python param_recovery.py --stochastic --out runs/figure1
}

spectrum() {  # linear VAEs of MNIST, 29 models: 15 min
    python -m studies.spectrum mnist --data-root "$DATA" --out runs/spectrum
}

toys() {  # Figures 2 and 5, basins of attraction, A.5.1, A.5.3: 10 min
    python toy_inference.py --out runs/figure2
    python toy_inference.py --grid 31 --iterations 100000 --frames 2 --out runs/basins
    python toy_inference.py --likelihoods sym --grid 31 --lr 2e-5 --samples 4 --iterations 300000 --frames 20 --out runs/basins_sym
    python toy_inference.py --family mixture --out runs/figure5
    python toy_inference.py --family laplace --out runs/a53_laplace
    python toy_inference.py --gradients --out runs/a51_gradients
}

study2d() {  # 2-D runs to convergence, ten seeds each: 35 runs of 3 to 6 min
    local budget="--samples 5 --infer-samples 1 --batch 100 --test-size 1000 --importance-samples 20000 --compile"
    local data pair schedule
    for data in mixture banana ring spiral sparse; do
        schedule="--lr 1e-3 --lr-half-life 60 --epochs 300 --eval-every 10"
        if [ $data = sparse ]; then schedule="--lr 1e-4 --lr-half-life 200 --epochs 800 --eval-every 20"; fi  # it collapses at 1e-3
        for pair in "elbo kld" "swersky kld" "bao kld" "bao kld --estimator unbiased" "fd kld" "fd fd" "fd fd-weighted"; do
            set -- $pair
            python train_synthetic.py --data $data --learn $1 --infer $2 ${3:-} ${4:-} $budget $schedule
        done
    done
}

study2d_noise() {  # 2-D data with noise of standard deviation 0.1, 6000 updates, ten seeds: 15 runs of 2 to 5 min
    local data pair
    for data in mixture banana ring spiral sparse; do
        for pair in "elbo" "bao --estimator unbiased" "dsm --estimator unbiased"; do
            python train_synthetic.py --data $data --noise 0.1 --learn $pair --samples 5 --infer-samples 1 --batch 100 --test-size 1000 \
                --importance-samples 20000 --compile --lr 1e-3 --lr-half-life 12 --epochs 60 --eval-every 10
        done
    done
}

study2d_variants() {  # the same with other initial standard deviations of p(x|z), FD inference of S and B, N = 1, minibatches of 1000: 22 runs of 3 to 6 min
    local budget="--infer-samples 1 --lr 1e-3 --lr-half-life 60 --epochs 300 --eval-every 10 --test-size 1000 --importance-samples 20000 --compile"
    local data learn pair sd
    for learn in elbo swersky bao; do
        python train_synthetic.py --data banana --learn $learn --infer kld --samples 5 $budget --batch 1000 --seeds 3
    done
    budget="$budget --batch 100"
    for sd in 0.05 0.2 0.4; do for learn in elbo swersky bao; do
        python train_synthetic.py --data mixture --learn $learn --infer kld --samples 5 $budget --init-sd $sd
    done; done
    for data in mixture banana; do
        for learn in swersky bao; do
            python train_synthetic.py --data $data --learn $learn --infer fd --samples 5 $budget
        done
        for pair in "elbo kld" "bao kld" "bao kld --estimator released"; do
            set -- $pair
            python train_synthetic.py --data $data --learn $1 --infer $2 ${3:-} ${4:-} --samples 1 $budget
        done
    done
}

mnist_budget="--net mlp --width 128 --dim-z 16 --infer-samples 1 --inner-steps 1 --batch 50 --lr 1e-3 --lr-half-life 2 --epochs 8"
mnist_budget="$mnist_budget --eval-every 1 --fid-every 1 --test-limit 2000"

study_mnist() {  # mnist, MLP of width 128, 9600 updates, five or three seeds: 54 runs of 2 to 8 min
    local seed pair
    for seed in 0 1 2 3 4; do
        for pair in "elbo kld" "swersky kld" "bao kld" "fd kld" "bao kld --estimator unbiased" "bao kld --estimator released" "fd fd-weighted" "fd fd"; do
            set -- $pair
            python train_images.py --data mnist --data-root "$DATA" --learn $1 --infer $2 ${3:-} ${4:-} $mnist_budget --samples 5 --init-sd 0.1 --seed $seed
        done
    done
    for seed in 0 1 2 3 4; do
        python train_images.py --data mnist --data-root "$DATA" --learn dsm --estimator unbiased $mnist_budget --samples 5 --init-sd 0.1 --seed $seed
    done
    for seed in 0 1 2; do for pair in "fd fd-repar" "swersky fd" "bao fd"; do
        set -- $pair
        python train_images.py --data mnist --data-root "$DATA" --learn $1 --infer $2 $mnist_budget --samples 5 --init-sd 0.1 --seed $seed
    done; done
}

study_samples() {  # the same with N = 1, 2 and 20, three seeds: 18 runs of 2 to 6 min
    local seed samples learn
    for seed in 0 1 2; do for samples in 1 2 20; do for learn in swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --learn $learn --infer kld $mnist_budget --samples $samples --init-sd 0.1 --seed $seed
    done; done; done
}

mnist_long="${mnist_budget/half-life 2/half-life 4}"  # twice as long, by the same schedule
mnist_long="${mnist_long/epochs 8/epochs 16}"

study_start() {  # the MLP from an initial standard deviation of 1, and from 0.1 for twice as long: 23 runs of 2 to 4 min
    local seed pair
    for seed in 0 1 2 3 4; do for pair in elbo swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --learn $pair $mnist_long --samples 5 --init-sd 1 --seed $seed
    done; done
    for pair in "fd" "bao --estimator unbiased"; do
        python train_images.py --data mnist --data-root "$DATA" --learn $pair $mnist_long --samples 5 --init-sd 1
    done
    for pair in elbo swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --learn $pair $mnist_long --samples 5 --init-sd 0.1
        python train_images.py --data mnist --data-root "$DATA" --learn $pair $mnist_budget --samples 5 --init-sd 1
    done
}

small_nets="--width 8 --dim-z 16 --infer-samples 1 --inner-steps 1 --batch 50 --eval-every 1 --fid-every 1 --test-limit 2000"
from_sd_1="$small_nets --lr 2e-3 --lr-half-life 1.5 --init-sd 1"

study_fashion() {  # fashion from an initial standard deviation of 1: the MLP, 19,200 updates, and ConvNets, 7200 updates: 15 runs of 3 to 5 min
    local seed pair norm
    for seed in 0 1 2; do for pair in elbo swersky bao; do
        python train_images.py --data fashion --data-root "$DATA" --learn $pair $mnist_long --samples 5 --init-sd 1 --seed $seed
    done; done
    for norm in batch none; do for pair in elbo swersky bao; do
        python train_images.py --data fashion --data-root "$DATA" --net conv --norm $norm --learn $pair $from_sd_1 --epochs 6 --samples 5
    done; done
}

study_conv() {  # ConvNets of width 8 on mnist, 6000 or 7200 updates, with and without batch norm: 51 runs of 4 to 6 min
    local budget="$small_nets --net conv --lr 1e-3 --lr-half-life 1.25 --epochs 5 --samples 5 --init-sd 0.1"
    local seed pair
    for seed in 0 1 2; do for pair in "elbo" "swersky" "bao" "fd" "bao --estimator unbiased" "fd --infer fd"; do
        python train_images.py --data mnist --data-root "$DATA" --learn $pair $budget --seed $seed
    done; done
    for seed in 0 1 2; do for pair in "bao --estimator released" "swersky --infer fd" "bao --infer fd" "fd --infer fd-weighted"; do
        python train_images.py --data mnist --data-root "$DATA" --learn $pair $budget --seed $seed
    done; done
    for seed in 0 1 2; do for pair in elbo swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --net conv --norm none --learn $pair $from_sd_1 --epochs 6 --samples 5 --seed $seed
    done; done
    for pair in elbo swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --net conv --norm none --learn $pair $budget
    done
    for seed in 0 1 2; do for pair in elbo swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --net conv --learn $pair $from_sd_1 --epochs 6 --samples 5 --seed $seed
    done; done
}

study_resnet() {  # ResNets of width 8 on mnist, 6000 updates, with N = 1 and 5: 8 runs of 8 to 21 min
    local seed pair
    for pair in elbo swersky bao; do for seed in 0 1; do
        python train_images.py --data mnist --data-root "$DATA" --net resnet --learn $pair $from_sd_1 --epochs 5 --samples 1 --seed $seed
    done; done
    for pair in swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --net resnet --learn $pair $from_sd_1 --epochs 5 --samples 5
    done
}

study_celeba() {  # ConvNets of width 8 on celeba, 4800 updates, two seeds with batch norm and one without; B and DSM from 1 with batch norm: 21 runs of 8 min
    local budget="--net conv --width 8 --dim-z 32 --samples 5 --infer-samples 1 --inner-steps 1 --batch 25 --epochs 6 --eval-every 1 --test-limit 500"
    local seed pair
    for seed in 0 1; do for pair in "elbo" "swersky" "bao" "bao --estimator unbiased" "fd"; do
        python train_images.py --data celeba --data-root "$DATA" $budget --init-sd 0.1 --lr 1e-3 --lr-half-life 1.5 --learn $pair --seed $seed
    done; done
    for pair in elbo swersky bao; do
        python train_images.py --data celeba --data-root "$DATA" $budget --norm none --init-sd 1 --lr 2e-3 --lr-half-life 2 --learn $pair
    done
    for pair in "bao --lr 2e-3" "bao --lr 1e-3" "bao --estimator unbiased --lr 2e-3" "elbo --lr 2e-3"; do
        python train_images.py --data celeba --data-root "$DATA" $budget --init-sd 1 --lr-half-life 2 --learn $pair
    done
    budget="--width 32 --dim-z 32 --samples 5 --infer-samples 1 --inner-steps 1 --batch 50 --epochs 1 --eval-every 1 --test-limit 500"
    for pair in "bao --seed 1 --lr 2e-3" "bao --estimator unbiased --lr 2e-3" "bao --seed 1 --lr 5e-4"; do  # the first epoch of runs in which B diverges
        python train_images.py --data celeba --data-root "$DATA" $budget --init-sd 1 --lr-half-life 3.75 --learn $pair
    done
    python train_images.py --data celeba --data-root "$DATA" ${budget/samples 5 --infer-samples 1/samples 2 --one-pass} --lr 2e-3 --lr-half-life 3.75 --learn dsm --estimator unbiased
}

study_celeba_gpu() {  # ConvNets of width 32 on celeba from 1, 6000 updates in tf32: 14 runs of 23 to 110 s, four at once on an H200
    local budget="--width 32 --dim-z 32 --samples 5 --infer-samples 1 --inner-steps 1 --batch 50 --precision tf32 --lr 2e-3 --lr-half-life 3.75 --epochs 15"
    budget="$budget --eval-every 1 --test-limit 1000 --init-sd 1"
    local seed pair
    for seed in 0 1; do for pair in "elbo --norm none" "swersky --norm none" "bao --norm none" elbo swersky bao; do
        python train_images.py --data celeba --data-root "$DATA" $budget --seed $seed --learn $pair
    done; done
    for pair in fd "bao --estimator unbiased"; do
        python train_images.py --data celeba --data-root "$DATA" $budget --learn $pair
    done
}

images_gpu() {  # ConvNets of the paper's size on mnist from 1, transients of 2400 updates: 8 runs of 80 s, four at once on an H200
    local budget="--samples 5 --infer-samples 1 --inner-steps 1 --lr 1e-3 --lr-half-life 1 --epochs 4 --eval-every 1 --fid-every 1 --test-limit 2000 --init-sd 1"
    local pair
    for pair in elbo swersky bao "elbo --norm none" "swersky --norm none" "bao --norm none" fd "fd --infer fd"; do
        python train_images.py --data mnist --data-root "$DATA" $budget --learn $pair
    done
}

transient() { python train_synthetic.py --eval-every 20 --importance-samples 20000 "$@"; }  # 10,000 updates at step 1e-4

figure3() {  # Figure 3, transients: 154 runs of 12 s to 6 min
    local data J K flags
    for data in mixture sparse; do for J in 0 5; do for K in 1 2 5 10; do
        set -- "--learn elbo" "--learn fd" "--learn fd --infer fd" "--learn swersky --samples 5" "--learn swersky --samples 5 --infer fd" \
            "--learn bao --samples 5" "--learn bao --samples 5 --infer fd"
        if [ $J = 0 ]; then
            set -- "$@" "--learn elbo --samples 5" "--learn bao" "--learn swersky --estimator released" "--learn bao --estimator released"
        fi
        if [ $J = 0 ] && [ $K = 5 ]; then
            set -- "$@" "--learn fd --samples 5" "--learn swersky --infer fd --estimator released" "--learn bao --infer fd" \
                "--learn bao --infer fd --estimator released" "--learn bao --samples 5 --estimator unbiased"
        fi
        for flags in "$@"; do
            transient --data $data --inner-steps $K --bilevel-steps $J --batch 100 --test-size 1000 --compile $flags
        done
    done; done; done
}

figure7() {  # Figure 7, transients, of which figure3 has those of mixture and sparse: 45 runs of 24 s to 3 min
    local data flags
    for data in mixture banana ring spiral sparse; do
        for flags in "elbo" "elbo --samples 5" "fd" "fd --samples 5" "fd --infer fd" "swersky --samples 5" \
                "swersky --samples 5 --infer fd" "bao --samples 5" "bao --samples 5 --infer fd"; do
            transient --data $data --batch 100 --test-size 1000 --compile --learn $flags
        done
    done
}

figure3_batch200() {  # transients of minibatch 200 on mixture: 17 runs of 1 to 9 min
    local flags
    for flags in "elbo" "elbo --samples 5" "fd" "fd --infer fd" "fd --infer fd --inner-lr 1e-2" \
            "swersky --estimator released" "swersky --samples 5" "swersky --samples 5 --infer fd" "swersky --samples 5 --bilevel-steps 5" \
            "bao" "bao --estimator released" "bao --samples 5" "bao --samples 5 --infer fd" "bao --samples 5 --bilevel-steps 5"; do
        transient --data mixture --batch 200 --test-size 2000 --learn $flags
    done
    for flags in "--inner-lr 1e-4" "--inner-lr 1e-4 --inner-steps 20" "--init-sd 0.5"; do
        transient --data mixture --batch 200 --test-size 2000 --learn fd --infer fd $flags --eval-every 10
    done
}

pairs=("elbo" "fd" "fd --infer fd" "swersky" "swersky --infer fd" "bao" "bao --infer fd" "fae")
few_images() { python train_images.py --data-root "$DATA" --dim-z 16 --init-sd 0.1 --inner-steps 1 --batch 50 --lr 2e-3 --eval-every 1 "$@"; }

images() {  # image tables, transients of 1000 updates, two seeds, also with group norm: 38 runs of 1 to 7 min
    local budget="--limit 10000 --test-limit 1000 --width 16 --epochs 5"
    local seed data flags
    for seed in 0 1; do
        for data in mnist fashion; do for flags in "${pairs[@]}"; do
            few_images --data $data $budget --seed $seed --learn $flags
        done; done
        for flags in "elbo" "fd --infer fd" "bao"; do
            few_images --data mnist $budget --norm group --seed $seed --learn $flags
        done
    done
}

images_resnet() {  # image tables, ResNets, transients of 1000 updates, two seeds: 14 runs of 2 to 10 min
    local seed flags
    for seed in 0 1; do for flags in "${pairs[@]:0:7}"; do
        few_images --data mnist --net resnet --limit 10000 --test-limit 1000 --width 8 --epochs 5 --seed $seed --learn $flags
    done; done
}

images_celeba() {  # image tables, transients of 240 updates: 16 ConvNets of 30 to 70 s, 13 ResNets of 2 to 3 min
    local budget="--data celeba --limit 4000 --test-limit 500 --samples 2 --width 8 --epochs 3"
    local net flags
    for net in "conv --seed 0" "conv --seed 1" "resnet --seed 0"; do for flags in "${pairs[@]}"; do
        few_images $budget --net $net --learn $flags
    done; done
    for flags in "elbo" "fd" "fd --infer fd" "swersky" "bao"; do
        few_images $budget --net resnet --seed 1 --learn $flags
    done
}

images_mlp() {  # claim 8, an MLP with 100 latents, transients of 4000 updates, two seeds: 8 runs of 1 to 2 min
    local budget="--net mlp --limit 20000 --test-limit 1000 --samples 1 --init-sd 0.1 --inner-steps 1 --lr 1e-3 --epochs 20 --eval-every 5"
    local seed flags
    for seed in 0 1; do for flags in "elbo" "elbo --latent bernoulli" "fd" "fd --infer fd"; do
        python train_images.py --data mnist --data-root "$DATA" $budget --seed $seed --learn $flags
    done; done
}

evaluations() {  # tables, gradient SNR and scale of the latents of finished runs: seconds a run, 2 min for the SNR
    local runs=runs/images budget=limit10000-test-limit1000
    python evaluate.py $runs/mnist-conv-*-$budget-width16-dim-z16-* --images 200 --iw-samples 100 --out runs/evaluation/mnist
    python evaluate.py $runs/mnist-conv-{kld-elbo,fd-fd,kld-bao}-$budget-width16-* --images 200 --iw-samples 100 --out runs/evaluation/group
    python evaluate.py $runs/mnist-resnet-*-$budget-width8-* --images 200 --iw-samples 100 --out runs/evaluation/resnet
    python evaluate.py $runs/fashion-conv-*-$budget-width16-* --images 200 --iw-samples 100 --out runs/evaluation/fashion
    python evaluate.py $runs/mnist-mlp-*-limit20000-* --images 200 --iw-samples 100 --out runs/evaluation/mlp
    python evaluate.py $runs/mnist-conv-*-gamma{fixed,stationary}-*-lr0.002-* $runs/mnist-conv-*-width16-init-sd0.2231-inner-steps1-one-pass-* --sampler mixture --fits 5 --draws 10 --images 20 --iw-samples 10 --out runs/evaluation/gamma
    python evaluate.py $runs/{mnist,fashion}-conv-*-gammafixed-*-lr0.001-* --sampler mixture --fits 5 --draws 10 --images 20 --iw-samples 10 --out runs/evaluation/width
    python evaluate.py $runs/celeba-conv-*-test-limit2000-* --sampler mixture --images 20 --iw-samples 10 --out runs/evaluation/celeba_fid
    python evaluate.py $runs/celeba-*-limit4000-* --images 100 --iw-samples 30 --out runs/evaluation/celeba
    python -m studies.gradient_snr --draws 50 $runs/mnist-conv-kld-elbo-$budget-width16-dim-z16-*
    python -m studies.gradient_snr $runs/mnist-mlp-kld-{elbo,swersky,bao}-test-limit2000-infer-samples1-*-seed[23]
    python -m studies.gradient_snr $runs/mnist-conv-kld-{elbo,swersky,bao}-test-limit2000-infer-samples1-width8-dim-z16-init-sd0.1-*-seed0
    python -m studies.latent_scale $runs/mnist-{mlp,conv,resnet}-kld-*-test-limit2000-*
    python -m studies.latent_scale $runs/celeba-conv-kld-*-test-limit1000-* $runs/mnist-conv-fd-fd-test-limit2000-infer-samples1-inner-steps1-*
    python -m studies.latent_scale $runs/fashion-{mlp,conv}-kld-*-test-limit2000-* $runs/celeba-conv-kld-*-test-limit500-*
}

study_gamma() {  # ConvNets of width 16 with 100 latents and batch norm, log gamma fixed at -2, -3 (three seeds) and -4, 3600 updates; at -3 also widths 8 (three seeds), 32 and 64 (two seeds), group norm, two forward passes, 14,400 updates; stationary and learnt gamma (three seeds): 60 runs of 4 to 75 min
    local budget="--data mnist --net conv --samples 5 --inner-steps 1 --one-pass --batch 50 --lr 2e-3 --lr-half-life 0.75 --epochs 3"
    budget="$budget --eval-every 1 --fid-every 1 --test-limit 2000 --gamma fixed"
    local pair sd seed width
    for sd in 0.3679 0.2231 0.1353; do for pair in "elbo" "swersky" "dsm --estimator unbiased"; do
        python train_images.py $budget --data-root "$DATA" --width 16 --init-sd $sd --learn $pair
    done; done
    for pair in "elbo" "swersky" "dsm --estimator unbiased"; do for seed in 1 2; do
        python train_images.py $budget --data-root "$DATA" --width 16 --init-sd 0.2231 --learn $pair --seed $seed
    done; done
    for width in 8 32 64; do for pair in "elbo" "swersky" "dsm --estimator unbiased"; do for seed in 0 1 2; do
        if [ $width$seed != 322 ] && [ $width$seed != 642 ]; then  # seed 2 was run at width 8 alone
            python train_images.py $budget --data-root "$DATA" --width $width --init-sd 0.2231 --learn $pair --seed $seed
        fi
    done; done; done
    for pair in "elbo" "swersky" "dsm --estimator unbiased"; do  # stationary gamma
        python train_images.py ${budget/fixed/stationary} --data-root "$DATA" --width 16 --learn $pair
    done
    for pair in "elbo" "swersky" "dsm --estimator unbiased"; do  # group norm
        python train_images.py $budget --data-root "$DATA" --width 16 --norm group --init-sd 0.2231 --learn $pair
    done
    for seed in 0 1 2; do for pair in "elbo" "swersky" "dsm --estimator unbiased"; do  # learnt gamma
        python train_images.py ${budget/--gamma fixed/} --data-root "$DATA" --width 16 --init-sd 0.2231 --learn $pair --seed $seed
    done; done
    for pair in "elbo" "swersky" "dsm --estimator unbiased"; do  # until FID has arrived
        python train_images.py $budget --lr-half-life 3 --epochs 12 --data-root "$DATA" --width 16 --init-sd 0.2231 --learn $pair
    done
    for pair in "elbo" "swersky" "bao" "dsm --estimator unbiased" "elbo --seed 1" "elbo --seed 2"; do  # two forward passes
        python train_images.py ${budget/--one-pass /} --data-root "$DATA" --width 16 --init-sd 0.2231 --learn $pair
    done
}

study_width() {  # the pairs of Table 1 and DSM at the paper's width of 64, MNIST and Fashion-MNIST; on MNIST the ELBO, S, B and DSM at widths 16, 32 and 64 (three seeds) and 8, F at 16, 32 and 64; log gamma fixed at -3, 1200 updates of 1e-3, two pairs also of 2e-3: 56 runs of 2 to 25 min
    local budget="--net conv --samples 5 --infer-samples 1 --inner-steps 1 --batch 50 --lr 1e-3 --lr-half-life 0.25 --epochs 1"
    budget="$budget --eval-every 1 --fid-every 1 --test-limit 2000 --gamma fixed --init-sd 0.2231"
    local pair width data seed
    for data in mnist fashion; do
        for pair in "elbo" "fd" "swersky" "bao" "dsm --estimator unbiased" "fd --infer fd" "swersky --infer fd" "bao --infer fd"; do
            python train_images.py $budget --data $data --data-root "$DATA" --width 64 --learn $pair
        done
    done
    for pair in "bao" "fd --infer fd"; do
        python train_images.py ${budget/1e-3/2e-3} --data mnist --data-root "$DATA" --width 64 --learn $pair
    done
    for width in 16 32; do python train_images.py $budget --data mnist --data-root "$DATA" --width $width --learn fd; done
    for width in 8 16 32; do for pair in "elbo" "swersky" "bao" "dsm --estimator unbiased"; do
        python train_images.py $budget --data mnist --data-root "$DATA" --width $width --learn $pair
    done; done
    for seed in 1 2; do
        for width in 16 32 64; do for pair in "elbo" "swersky" "dsm --estimator unbiased"; do
            python train_images.py $budget --data mnist --data-root "$DATA" --width $width --learn $pair --seed $seed
        done; done
        for width in 16 32 64; do python train_images.py $budget --data mnist --data-root "$DATA" --width $width --learn bao --seed $seed; done
    done
}

study_celeba_fid() {  # ConvNets on celeba: one run of the ELBO of 7200 updates, four objectives of 1200 with stationary gamma (widths 16 and 32), and three of 800 with log gamma fixed at -4 (width 32): 12 runs of 4 to 20 min
    local budget="--data celeba --inner-steps 1 --one-pass --batch 50 --lr 2e-3 --test-limit 2000" pair
    python train_images.py $budget --data-root "$DATA" --width 16 --dim-z 32 --learn elbo --samples 1 --epochs 18 --lr-half-life 4.5 --eval-every 3
    for pair in "elbo" "fd" "swersky" "dsm --estimator unbiased"; do
        python train_images.py $budget --data-root "$DATA" --width 16 --dim-z 32 --samples 2 --gamma stationary --epochs 3 --lr-half-life 0.75 --eval-every 3 --learn $pair
    done
    for pair in "elbo" "fd" "swersky" "dsm --estimator unbiased"; do  # width 32 and 100 latents
        python train_images.py $budget --data-root "$DATA" --width 32 --samples 2 --gamma stationary --epochs 3 --lr-half-life 0.75 --eval-every 3 --learn $pair
    done
    for pair in elbo fd swersky; do  # with N = 1 S is F
        python train_images.py $budget --data-root "$DATA" --width 32 --samples 1 --gamma fixed --init-sd 0.1353 --epochs 2 --lr-half-life 0.5 --eval-every 1 --learn $pair
    done
}

figure6() {  # the larger network of Figure 6 on banana, with J bi-level steps, 15,000 updates (F with J = 5 also 45,000), three seeds: 13 runs of 2 to 40 min
    local budget="--data banana --hidden 100 --seeds 3 --samples 5 --infer-samples 1 --batch 100 --lr 1e-3 --lr-half-life 30 --epochs 150 --eval-every 10"
    budget="$budget --test-size 1000 --importance-samples 20000"
    local pair
    for pair in elbo fd swersky bao "bao --estimator unbiased" "swersky --inner-steps 20" "bao --inner-steps 20"; do
        python train_synthetic.py $budget --compile --learn $pair
    done
    for pair in swersky bao fd "bao --estimator unbiased"; do python train_synthetic.py $budget --learn $pair --bilevel-steps 5; done
    python train_synthetic.py $budget --learn swersky --bilevel-steps 20
    budget="${budget/half-life 30/half-life 90}"
    python train_synthetic.py ${budget/epochs 150/epochs 450} --learn fd --bilevel-steps 5
}

audits() {  # the reports of docs/extending.md: seconds each
    local objective
    for objective in "elbo" "fd" "swersky" "swersky --estimator unbiased" "bao" "bao --estimator unbiased" "bao --estimator released" "dsm" "dsm --estimator unbiased" "fae"; do
        python audit.py $objective
    done
}

speed() {  # the performance table: 20 min, with nothing else running
    OMP_NUM_THREADS=2 python -m benchmarks.benchmark --net conv --pairs KLD-ELBO KLD-F KLD-S KLD-B FD-F FD-B FAE FD-REPAR-F
}

speed_gpu() {  # the performance table of a GPU: 30 s on an H200
    python -m benchmarks.benchmark --net conv --pairs KLD-F --precision float32 tf32 bf16 --repeats 3
}

parts="figure1 spectrum toys study2d study2d_noise study2d_variants study_mnist study_samples study_start study_fashion study_conv study_resnet study_celeba study_celeba_gpu images_gpu figure3 figure7 figure3_batch200"
parts="$parts images images_resnet images_celeba images_mlp evaluations figure6 audits speed speed_gpu study_gamma study_width study_celeba_fid"
case " $parts " in
    *" ${1:-} "*) "$1" ;;
    *) echo "usage: results/reproduce.sh ${parts// /|} [-n]" >&2; exit 2 ;;
esac
