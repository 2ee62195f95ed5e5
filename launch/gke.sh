#!/usr/bin/env bash
# A TPU slice on Google Kubernetes Engine: through XPK, or with kubectl and gke.yaml.
# Never run on a real cluster: its commands are checked by --dry-run alone.
#
#   launch/gke.sh [--dry-run] xpk|apply|logs|delete --image=IMAGE --cluster=NAME [options]
#       [-- flags of sparse_flax.main]
#
#   --image=IMAGE      built of launch/Dockerfile with ACCELERATOR=tpu, and pushed
#   --cluster=NAME     of XPK (xpk); the others use kubectl's own
#   --name=NAME        of the workload (sparse-flax)
#   --type=TYPE        of XPK, v5litepod-16
#   --storage=NAME     of XPK, made by xpk storage attach: where all hosts write --workdir
#   --claim=NAME       the volume claim that gke.yaml mounts at /runs (sparse-flax-runs)
#
# gke.yaml is for v5litepod-16, four hosts of four chips; the numbers to change for
# others stand at its top.
set -euo pipefail

dry_run='' action='' name=sparse-flax image='' cluster='' type=v5litepod-16 storage=''
claim=sparse-flax-runs flags=()
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --cluster=*) cluster=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --claim=*) claim=${1#*=} ;;
        --storage=*) storage=${1#*=} ;;
        --)
            shift
            flags=("$@")
            break
            ;;
        xpk | apply | logs | delete) action=$1 ;;
        *)
            echo "error: $1 is neither an action nor an option; see the top of $0" >&2
            exit 2
            ;;
    esac
    shift
done

need() {
    if [[ -z $2 ]]; then
        echo "error: --$1=... is missing; see the top of $0" >&2
        exit 2
    fi
}

do_it() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

case $action in
    xpk)
        need image "$image"
        need cluster "$cluster"
        # XPK itself restarts nothing, and of what fails only 42 and from 127 on: 143 is a
        # run that saved at a SIGTERM, 1 one whose other host is gone.
        do_it xpk workload create --cluster="$cluster" --workload="$name" \
            --tpu-type="$type" --docker-image="$image" ${storage:+"--storage=$storage"} \
            --max-restarts=1000 --restart-on-exit-codes=1 \
            --command="python -m sparse_flax.main$(printf ' %q' "${flags[@]}")"
        ;;
    apply)
        need image "$image"
        # A list in JSON is one in YAML, too.
        arguments=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${flags[@]}")
        filled=$(NAME=$name IMAGE=$image CLAIM=$claim ARGUMENTS=$arguments python3 -c '
import os, string, sys
print(string.Template(open(sys.argv[1]).read()).substitute(os.environ))' \
            "$(dirname "$0")/gke.yaml")
        if [[ $dry_run ]]; then
            echo "$filled"
        else
            kubectl apply -f - <<<"$filled"
        fi
        ;;
    logs) do_it kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name" \
        --prefix --tail=100 --max-log-requests=64 ;;
    delete) do_it kubectl delete jobset "$name" ;;
    *)
        echo "error: say what to do: xpk, apply, logs or delete" >&2
        exit 2
        ;;
esac
