#!/usr/bin/env bash
# The commands of every published figure and table. `results/reproduce.sh PART` runs one part, `results/reproduce.sh PART -n` prints its
# commands, one a line, for xargs, GNU parallel or a Slurm array (docs/cluster.md). Runs resume and finished ones are skipped.
# Times are those of one core of a CPU. Set DATA to the folder of MNIST and Fashion-MNIST.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data}
if [ "${2:-}" = -n ]; then python() { echo "python $*"; }; fi

figure1() {  # Figure 1 and every rule: 1 min
    python param_recovery.py --stochastic --out runs/figure1
}

spectrum() {  # linear VAEs of MNIST, 22 models: 5 min
    python param_recovery.py --spectrum mnist --data-root "$DATA" --out runs/spectrum
}

toys() {  # Figures 2 and 5, basins of attraction, A.5.1, A.5.3: 10 min
    python toy_inference.py --out runs/figure2
    python toy_inference.py --grid 31 --iterations 100000 --frames 20 --out runs/basins
    python toy_inference.py --likelihoods sym --grid 31 --lr 2e-5 --samples 4 --iterations 300000 --frames 20 --out runs/basins_sym
    python toy_inference.py --family mixture --out runs/figure5
    python toy_inference.py --family laplace --out runs/a53_laplace
    python toy_inference.py --gradients --out runs/a51_gradients
}

study2d() {  # 2-D runs to convergence, ten seeds each: 2 min a run (4 min without --compile, which needs a C++ compiler)
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

study2d_variants() {  # the same with other initial standard deviations of p(x|z), FD inference of S and B, and N = 1: 2 min a run
    local budget="--infer-samples 1 --batch 100 --lr 1e-3 --lr-half-life 60 --epochs 300 --eval-every 10"
    budget="$budget --test-size 1000 --importance-samples 20000 --compile"
    local data learn pair sd
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

study_mnist() {  # mnist, MLP of width 128, 9600 updates, five seeds: 2 to 3 min a run
    local seed pair
    for seed in 0 1 2 3 4; do
        for pair in "elbo kld" "swersky kld" "bao kld" "fd kld" "bao kld --estimator unbiased" "bao kld --estimator released" "fd fd-weighted" "fd fd"; do
            set -- $pair
            python train_images.py --data mnist --data-root "$DATA" --learn $1 --infer $2 ${3:-} ${4:-} $mnist_budget --samples 5 --seed $seed
        done
    done
    python train_images.py --data mnist --data-root "$DATA" --learn fd --infer fd-repar $mnist_budget --samples 5
}

study_samples() {  # the same with N = 1 and 2, three seeds: 2 min a run
    local seed samples learn
    for seed in 0 1 2; do for samples in 1 2; do for learn in swersky bao; do
        python train_images.py --data mnist --data-root "$DATA" --learn $learn --infer kld $mnist_budget --samples $samples --seed $seed
    done; done; done
}

figure3() {  # Figure 3, transients of 10,000 updates at step 1e-4: 154 runs of 1 to 3 min
    local budget="--batch 100 --eval-every 20 --test-size 1000 --importance-samples 20000"
    local data J K flags
    for data in mixture sparse; do for J in 0 5; do for K in 1 2 5 10; do
        for flags in "--learn elbo" "--learn fd" "--learn fd --infer fd" "--learn swersky --samples 5" "--learn swersky --samples 5 --infer fd" \
                "--learn bao --samples 5" "--learn bao --samples 5 --infer fd" "--learn elbo --samples 5" "--learn bao" \
                "--learn swersky --estimator released" "--learn bao --estimator released"; do
            python train_synthetic.py --data $data --inner-steps $K --bilevel-steps $J $budget $flags
        done
    done; done; done
}

images() {  # image tables, transients of 1000 updates, two seeds: 70 to 150 s a run
    local data seed pair
    for data in mnist fashion; do for seed in 0 1; do
        for pair in "elbo kld" "fd kld" "fd fd" "swersky kld" "swersky fd" "bao kld" "bao fd" "fae fae"; do
            set -- $pair
            python train_images.py --data $data --data-root "$DATA" --limit 10000 --test-limit 1000 --width 16 --dim-z 16 --batch 50 --inner-steps 1 \
                --lr 2e-3 --epochs 5 --eval-every 1 --learn $1 --infer $2 --seed $seed
        done
    done; done
}

figure6() {  # the larger network of Figure 6: not run here
    local J K pair
    for J in 0 5 20; do for K in 5 20 50; do for pair in "elbo 1" "fd 1" "swersky 5" "bao 5"; do
        set -- $pair
        python train_synthetic.py --data sparse --learn $1 --samples $2 --inner-steps $K --bilevel-steps $J --hidden 100 --epochs 1000
    done; done; done
}

audits() {  # the reports of docs/audit.md: 30 s each
    local objective
    for objective in "elbo" "fd" "swersky" "swersky --estimator unbiased" "bao" "bao --estimator unbiased" "bao --estimator released" "fae"; do
        python audit.py $objective --data-root "$DATA"
    done
}

speed() {  # the performance table: 20 min, with nothing else running
    python benchmark.py --net conv --threads 2 --pairs KLD-ELBO KLD-F KLD-S KLD-B FD-F FD-B FAE FD-REPAR-F
    python benchmark.py --part ensemble --members 3 10 30 --threads 2 --repeats 7
}

case "${1:-}" in
    figure1 | spectrum | toys | study2d | study2d_variants | study_mnist | study_samples | figure3 | images | figure6 | audits | speed) "$1" ;;
    *) echo "usage: results/reproduce.sh figure1|spectrum|toys|study2d|study2d_variants|study_mnist|study_samples|figure3|images|figure6|audits|speed [-n]" >&2; exit 2 ;;
esac
