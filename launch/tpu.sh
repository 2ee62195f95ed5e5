#!/usr/bin/env bash
# A Cloud TPU VM or pod: create it, set it up, train on all of its hosts, delete it.
# Never run on real hardware: its commands are checked by --dry-run alone.
#
#   launch/tpu.sh [--dry-run] create|setup|run|logs|status|delete|keep [options] [-- flags]
#
#   --name=NAME       of the TPU (sparse-flax)
#   --zone=ZONE       (us-west4-a)
#   --type=TYPE       v5litepod-1 (one chip, one host), v5litepod-16 (four hosts), ...
#   --version=IMAGE   of the operating system (v2-alpha-tpuv5-lite)
#   --spot            cheaper, and taken away at any time: use keep
#   --source=URL      of this repository, to clone
#   --share=HOST:/DIR an NFS share (Filestore) that setup mounts at /mnt/share on every
#                     host; more than one host needs it for the working directory
#
# run and keep hand what follows -- to python -m sparse_flax.main; for example
#
#   launch/tpu.sh keep --spot --type=v5litepod-16 --share=10.0.0.2:/runs --source=URL -- \
#       --config=configs/enwik8.py --config.mesh.data=16 --config.train.batch_size=16 \
#       --config.eval.batch_size=16 --workdir=/mnt/share/enwik8
#
# keep creates, sets up and runs, looks every minute, and does again what is needed when
# the TPU was taken away, restarted or a host failed; training goes on from the last
# checkpoint. It ends with the run, or after ten failures. Ended itself, the same command
# goes on watching.
set -euo pipefail

dry_run='' action='' name=sparse-flax zone=us-west4-a type=v5litepod-1
version=v2-alpha-tpuv5-lite spot='' source='' share='' flags=()
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --spot) spot=--spot ;;
        --source=*) source=${1#*=} ;;
        --share=*) share=${1#*=} ;;
        --)
            shift
            flags=("$@")
            break
            ;;
        create | setup | run | logs | status | delete | keep) action=$1 ;;
        *)
            echo "error: $1 is neither an action nor an option; see the top of $0" >&2
            exit 2
            ;;
    esac
    shift
done

do_it() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

tpu() { do_it gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
on() { tpu ssh --worker="$1" --command="$2"; }

create() { tpu create --accelerator-type="$type" --version="$version" ${spot:+"$spot"}; }

setup() {
    need_source
    # A new machine updates itself at first, and has apt locked.
    local apt="sudo apt-get -qq -o DPkg::Lock::Timeout=600"
    local steps="$apt update && $apt install -y python3.11-venv nfs-common"
    steps+=" && (test -d sparse_flax || git clone --quiet $(printf %q "$source") sparse_flax)"
    steps+=" && python3.11 -m venv venv && venv/bin/pip install --quiet -e sparse_flax 'jax[tpu]'"
    if [[ $share ]]; then
        steps+=" && sudo mkdir -p /mnt/share"
        steps+=" && (mountpoint -q /mnt/share || sudo mount -t nfs $(printf %q "$share") /mnt/share)"
        steps+=" && sudo chmod 777 /mnt/share"
    fi
    on all "$steps"
}

run() {
    need_flags
    # In the background, so that a lost connection does not end it. Its exit status is
    # in run.status once it has ended.
    local train="cd sparse_flax && rm -f ../run.status && (trap '' HUP;"
    train+=" ../venv/bin/python -m sparse_flax.main$(printf ' %q' "${flags[@]}");"
    train+=" echo \$? > ../run.status) > ../run.log 2>&1 < /dev/null &"
    on all "$train"
}

logs() { on 0 "tail -n 100 -F run.log"; }
status() { tpu describe --format="value(state)"; }
# The exit status of the run, "none" if there is no run, or nothing while it goes on.
ended() {
    on 0 "cat run.status 2>/dev/null || pgrep -f '[s]parse_flax.main' >/dev/null || echo none"
}

need_source() {
    if [[ -z $source ]]; then
        echo "error: --source=URL is missing: what to clone" >&2
        exit 2
    fi
}

need_flags() {
    if ((${#flags[@]} == 0)); then
        echo "error: nothing to run; give the flags of sparse_flax.main after --" >&2
        exit 2
    fi
}

keep() {
    # Before anything is there that costs.
    need_source
    need_flags
    if [[ $dry_run ]]; then
        status
        create
        ended
        setup
        run
        echo "# and so on every minute: what is missing is made, what has stopped goes on"
        return
    fi
    local state code seen='' failures=0
    while true; do
        if ! state=$(status 2>/dev/null); then
            state=$(status 2>&1 || true)
            # Anything else may be the network from here, and no reason to delete.
            if [[ $state == *NOT_FOUND* ]]; then state=GONE; else echo "waiting: $state"; fi
        fi
        case $state in
            GONE | PREEMPTED | TERMINATED)
                echo "the TPU is $state: creating it"
                [[ $state == GONE ]] || delete || true
                create || echo "trying again in a minute"
                ;;
            READY)
                code=$(ended) || code=''
                # How an earlier run ended says nothing about this one.
                [[ $seen || -z $code ]] || code=none
                case $code in
                    '') seen=1 ;;
                    0 | 2)
                        echo "the run ended with status $code; launch/tpu.sh delete ends the costs"
                        exit "$code"
                        ;;
                    *)
                        # 143: it saved at a SIGTERM, which is a notice and no failure.
                        [[ $code == none || $code == 143 ]] || failures=$((failures + 1))
                        ((failures < 10)) || break
                        echo "status of the run: $code; starting it"
                        if setup && run; then seen=1; else failures=$((failures + 1)); fi
                        ;;
                esac
                ;;
        esac
        sleep 60
    done
    echo "error: ten failures; see launch/tpu.sh logs, and delete, which ends the costs" >&2
    exit 1
}

delete() { tpu delete --quiet; }

if [[ -z $action ]]; then
    echo "error: say what to do: create, setup, run, logs, status, delete or keep" >&2
    exit 2
fi
"$action"
