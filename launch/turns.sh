#!/usr/bin/env bash
# A run on machines that are lent for minutes: trained in turns, then scored and sampled.
#
#   launch/turns.sh SECONDS OUT --config=configs/cifar10.py --workdir=runs/cifar10 \
#       --config.mesh.data=8 --config.train.batch_size=64 --config.eval.batch_size=64
#   launch/turns.sh --dry-run SECONDS OUT --config=...    # prints what it would run
#
# Whatever is left after SECONDS gets a SIGTERM: training saves and ends, and the exit
# status is 75, which says: the same command again. After the last step it scores the
# whole test split, then samples (of images and sound: completions), by config.eval and
# config.sample. OUT gets the log, metrics, curve, scores and samples after every turn;
# the working directory and the data have to be there still in the next.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1 && shift; fi
if (($# < 3)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: call it as launch/turns.sh SECONDS OUT --config=... --workdir=..." >&2
    exit 2
fi
end=$((SECONDS + $1)) out=$2 workdir=
shift 2
for flag in "$@"; do
    case $flag in
        --workdir=*) workdir=${flag#*=} workdir=${workdir%/} ;;
        --mode | --mode=*)
            echo "error: $flag: the modes are train, eval and sample; leave it out" >&2
            exit 2
            ;;
    esac
done
if [[ -z $workdir ]]; then
    echo "error: name the run's folder, --workdir=FOLDER" >&2
    exit 2
fi

python=${PYTHON:-python}
log=$workdir.log

keep() {
    local file
    mkdir -p "$out"
    for file in "$workdir"/{metrics.jsonl,eval.jsonl,loss.png,sample.txt,generated*}; do
        if [[ -e $file ]]; then cp "$file" "$out/"; fi
    done
    cp "$log" "$out/log.txt"
}

# phase NAME FLAGS...: run it in what is left of the turn, unless it is finished.
phase() {
    local name=$1 status=143 left=$((end - SECONDS))
    shift
    if [[ -n $dry_run ]]; then
        printf '%q ' "$python" -m sparse_flax.main "$@"
        echo
        return
    fi
    if [[ -e $workdir.$name ]]; then return; fi
    if ((left > 0)); then
        status=0
        timeout --preserve-status --signal=TERM "$left" \
            "$python" -m sparse_flax.main "$@" 2>&1 | tee -a "$log" || status=$?
        keep
    fi
    if ((status == 143)); then
        echo "$name: out of time; the same command goes on"
        exit 75
    fi
    if ((status)); then exit "$status"; fi
    touch "$workdir.$name"
}

if [[ -z $dry_run ]]; then mkdir -p "$(dirname "$workdir")"; fi
phase trained "$@"
phase scored --mode=eval "$@" --config.eval.max_windows=0
phase sampled --mode=sample "$@"
