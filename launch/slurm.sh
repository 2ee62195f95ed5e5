#!/usr/bin/env bash
# Hosts with GPUs under SLURM: one process a GPU, as jax expects it there.
# Never run on a real cluster; the processes' start is tested with SLURM's variables.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#       --config=configs/enwik8.py --config.mesh.data=16 --config.train.batch_size=16 \
#       --config.eval.batch_size=16 --workdir=/shared/enwik8
#   launch/slurm.sh --dry-run --config=...      # prints what it would run
#
# The working directory has to lie on a file system that all hosts share. SLURM's notice
# before the time limit is a SIGTERM (--signal), at which all hosts save the same step;
# the job then asks to be put into the queue again, and goes on from there.
#SBATCH --job-name=sparse_flax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

python=${PYTHON:-python}
if [[ ${1:-} == --dry-run ]]; then
    shift
    printf '%q ' srun --kill-on-bad-exit=1 "$python" -m sparse_flax.main "$@"
    echo
    exit
fi
# SLURM sends its notice to the steps; what it kills of this script is of no use to them.
trap '' TERM
status=0
srun --kill-on-bad-exit=1 "$python" -m sparse_flax.main "$@" || status=$?
# 143 is a run that saved at a SIGTERM; far from the end of its time, somebody's scancel.
if ((status == 143)) && [[ ${SLURM_JOB_END_TIME:-0} -gt 0 ]] &&
    ((SLURM_JOB_END_TIME - $(date +%s) < 180)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
