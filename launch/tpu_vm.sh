#!/usr/bin/env bash
# Trains on a Cloud TPU VM or on a slice of several hosts, with gcloud alone: see the usage below.
# Nothing is kept on this side: the flags and the TPU's own state say everything, from any machine.
set -euo pipefail

usage() {
  cat << 'END'
usage: launch/tpu_vm.sh COMMAND NAME --zone ZONE [flags] [-- arguments of python -m gpt2_jax.train]

  up       create, setup and run, as far as needed; the same line resumes after a preemption or a crash
  resume   another name for up
  watch    up, and again after every preemption or crash, until the training has ended
  create   ask for the TPU: on demand or with --spot, at once or with --queued
  setup    copy this checkout to every worker, install it, mount --storage
  run      start the training on every worker; it goes on when this terminal closes
  status   the state of the TPU, and of the training on every worker
  logs     follow the log of worker 0, or of --worker N
  stop     every worker finishes its update and saves (SIGTERM); run continues
  exec     a shell command on every worker, in the checkout: exec NAME --zone ZONE -- COMMAND
  delete   delete the TPU and its disks

  --zone ZONE          such as us-west4-a (cloud.google.com/tpu/docs/regions-zones)
  --type TYPE          accelerator type: v4-32, v5litepod-16, v5p-8, v6e-16, ... (up, watch, create)
  --spot               cheaper, and taken away at any time
  --queued             as a queued resource, which waits until there is a TPU (status and delete need the flag, too)
  --storage WHERE      keeps runs/ (up, watch, setup): HOST:/SHARE for NFS, gs://BUCKET for a bucket with a hierarchical
                       namespace, none for the TPU's own disk, which goes with it
  --init FILE          bash script that setup runs on every worker, in the checkout, before it mounts --storage: to
                       fetch data/, for example, or to install gcsfuse for gs:// where the image has none
  --version VERSION    software of the TPU VM; by default what fits the type
  --project PROJECT    by default that of gcloud's configuration
  --create-flag=FLAG   one more flag for gcloud's create, such as --create-flag=--reserved; may be repeated
  --worker N           whose log
  --dry-run            print the commands, run none

A TPU costs money from READY to delete, whether it computes or not: 16 chips at, say, 1.20 $ an hour each, 461 $ a day.
END
}

die() {
  echo "error: $*" >&2
  exit 2
}

# A command as one would type it.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

# Runs a command, and shows it before that; with --dry-run shows it only.
call() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

tpus() { call gcloud compute tpus "$@" --zone="$zone" "${project[@]}"; }

# on WORKER SCRIPT: a shell script on one worker, or on `all` at the same time.
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# How to go on: another command of this script on the same TPU.
next() { quoted "$0" "$1" "$name" --zone "$zone" ${queued:+--queued} "${project[@]}"; }

runtime_version() {
  case $type in # cloud.google.com/tpu/docs/runtimes
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "which software does --type $type need? type --version (cloud.google.com/tpu/docs/runtimes)" ;;
  esac
}

# The state of the TPU, ABSENT if there is none. Every other failure of gcloud's is one here: what could not be seen
# must not be created a second time.
state() {
  local kind=tpu-vm value=state errors=$temporary/errors
  [[ -z $queued ]] || kind=queued-resources value=state.state
  if [[ -n $dry_run ]]; then
    echo ABSENT
  elif ! gcloud compute tpus $kind describe "$name" --format="value($value)" --zone="$zone" "${project[@]}" 2> "$errors"
  then
    grep -q NOT_FOUND "$errors" || { cat "$errors" >&2 && return 1; }
    echo ABSENT
  fi
}

create() {
  local flags=(--accelerator-type="$type" ${spot:+--spot} "${create_flags[@]}")
  if [[ -n $queued ]]; then
    tpus queued-resources create "$name" --node-id="$name" --runtime-version="$version" "${flags[@]}"
  else
    tpus tpu-vm create "$name" --version="$version" "${flags[@]}"
  fi
  echo "$name costs money until you type: $(next delete)" >&2
}

delete() {
  if [[ -n $queued ]]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# Until the TPU can be used: creates it where there is none, or none any more.
ensure() {
  local now
  while true; do
    now=$(state)
    [[ -n $dry_run ]] || echo "$name is $now" >&2
    case $now in
      READY | ACTIVE) return ;;
      ABSENT) create ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        delete
        create
        ;;
      STOPPED) die "$name is stopped; type gcloud compute tpus tpu-vm start $name --zone=$zone, or $(next delete)" ;;
      *) sleep "$poll" ;;
    esac
    [[ -z $dry_run ]] || return 0
  done
}

setup() {
  local archive=gpt2_jax.tar.gz mount=true bucket=${storage#gs://}
  case $storage in
    none) ;;
    gs://*)
      # A checkpoint is finished by renaming its directory; only in a hierarchical namespace is that one step.
      if [[ -z $dry_run && $(gcloud storage buckets describe "$storage" --raw \
        --format='value(hierarchicalNamespace.enabled)' "${project[@]}") != True ]]; then
        die "$storage has no hierarchical namespace, without which checkpoints can break; make one that has:" \
          "gcloud storage buckets create gs://NAME --uniform-bucket-level-access --enable-hierarchical-namespace"
      fi
      # What one worker writes the others have to see: nothing about files is cached.
      mount="gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 $bucket ~/storage"
      ;;
    *) mount="{ sudo apt-get install -qq -y nfs-common && sudo mount -t nfs $storage ~/storage; }" ;;
  esac
  if [[ -z $dry_run ]]; then
    archive=$temporary/$archive
    # All that git knows or does not ignore, as it is now: a config that you have just written, too.
    git ls-files -z --cached --others --exclude-standard --deduplicate |
      while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
      tar --create --gzip --null --files-from=- --file="$archive"
  fi
  tpus tpu-vm scp "$archive" "$name:gpt2_jax.tar.gz" --worker=all
  [[ -z $init ]] || tpus tpu-vm scp "$init" "$name:gpt2_jax_init.sh" --worker=all
  # The Python of these images is 3.10; uv brings a newer one.
  on all "set -e
mkdir -p ~/gpt2_jax ~/storage ~/training
cd ~/gpt2_jax
tar -xzf ~/gpt2_jax.tar.gz
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
${init:+(source .venv/bin/activate; bash ~/gpt2_jax_init.sh)
}mountpoint -q ~/storage || $mount
mkdir -p ~/storage/runs
[ -e runs ] || ln -s ~/storage/runs runs
[ -e data ] || ln -sfn ~/storage/data data"
}

# The lock is held while the training runs; a process id alone could have become another process's.
run() {
  on all "cd ~/gpt2_jax || exit
flock -n ~/training/lock true || { echo \"\$HOSTNAME: running already\"; exit 0; }
rm -f ~/training/pid ~/training/exit_code
setsid nohup flock -w 10 ~/training/lock bash -c \
'\"\$@\" & echo \$! > ~/training/pid; wait \$!; echo \$? > ~/training/exit_code' training \
.venv/bin/python -m gpt2_jax.train $(quoted "$@") < /dev/null >> ~/training/log 2>&1 &
timeout 20 sh -c 'until [ -s ~/training/pid ]; do sleep 0.1; done'"
}

# What became of the training, one line a worker.
training() {
  on all "cd ~/training 2> /dev/null || { echo \"\$HOSTNAME: not set up\"; exit 0; }
if ! flock -n lock true; then echo \"\$HOSTNAME: running\"
elif [ -s exit_code ]; then echo \"\$HOSTNAME: ended with exit code \$(cat exit_code)\"
elif [ -e log ]; then echo \"\$HOSTNAME: cut off\"
else echo \"\$HOSTNAME: not started\"; fi"
}

stop() {
  on all "cd ~/training || exit
if flock -n lock true; then echo \"\$HOSTNAME: not running\"
else kill -TERM \"\$(cat pid)\"; flock -w 900 lock echo \"\$HOSTNAME: stopped\"; fi"
}

up() {
  ensure
  if [[ -z $dry_run ]] && training | grep ': running$'; then
    return
  fi
  setup
  run "$@"
}

# Ends with 0 when the training has, with 2 if it refuses its arguments (it would again), 143 if somebody stopped it.
watch() {
  local crashes=0 stopped code now report
  while ((crashes < 3)); do
    # In a process of its own: that there is no spot TPU just now, say, ends that one only.
    code=0
    "$0" up "${given[@]}" || code=$?
    ((code != 2)) || exit 2
    if ((code)); then
      now=$(state) || now=unknown # the network, say
      [[ $now != READY && $now != ACTIVE ]] || ((++crashes))
      sleep "$poll"
      continue
    fi
    [[ -z $dry_run ]] || return 0
    stopped=0
    while sleep "$poll"; do
      now=$(state) || continue
      case $now in
        READY | ACTIVE) ;;
        ABSENT) echo "error: somebody has deleted $name" >&2 && exit 1 ;;
        *) break ;;
      esac
      report=$(training) || continue
      if grep -q ': running$' <<< "$report"; then
        continue
      fi
      echo "$report"
      if ! grep -qv ' code 0$' <<< "$report"; then
        echo "done; $name costs money until you type: $(next delete)"
        return
      elif grep -q ' code 2$' <<< "$report"; then
        die "the training refuses what it was given: $(next logs)"
      elif grep -q ' code 143$' <<< "$report"; then
        ((++stopped < 5)) || exit 143 # a preemption is a SIGTERM, too, but then the TPU soon is no longer READY
      else
        ((++crashes))
        break
      fi
    done
  done
  echo "error: crashed $crashes times: $(next logs)" >&2
  exit 1
}

status() {
  local now
  now=$(state)
  [[ -n $dry_run ]] || echo "$name is $now"
  [[ $now != READY && $now != ACTIVE && -z $dry_run ]] || training
}

logs() { on "$worker" 'tail -n 100 -F ~/training/log'; }

main() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "this needs bash 4.4, found $BASH_VERSION"
  local command=${1:-} flag
  case $command in
    up | resume | watch | create | setup | run | status | logs | stop | exec | delete) shift ;;
    -h | --help) usage && exit ;;
    '') usage >&2 && exit 2 ;;
    *) die "no command $command; type $0 --help" ;;
  esac
  given=("$@") name=${1:-} zone='' type='' spot='' queued='' storage='' init='' version='' worker=0 dry_run=''
  create_flags=() project=() poll=${POLL_SECONDS:-30} temporary=''
  [[ $name != -h && $name != --help ]] || { usage && exit; }
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "expected the TPU's name (a-z, 0-9, -) after $command, found '$name'"
  shift
  while (($#)) && [[ $1 != -- ]]; do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    flag=$1
    case $flag in
      -h | --help) usage && exit ;;
      --spot) spot=yes && shift && continue ;;
      --queued) queued=yes && shift && continue ;;
      --dry-run) dry_run=yes && shift && continue ;;
    esac
    [[ -n ${2:-} && ${2:-} != -- ]] || die "$flag needs a value; type $0 --help"
    case $flag in
      --create-flag) create_flags+=("$2") ;;
      --project) project=(--project="$2") ;;
      --zone | --type | --storage | --init | --version | --worker) printf -v "${flag#--}" %s "$2" ;;
      *) die "no flag $flag; type $0 --help; flags of the training stand after --" ;;
    esac
    shift 2
  done
  (($# == 0)) || shift # the --

  [[ -n $zone ]] || die "where? type --zone, such as --zone us-west4-a"
  case $command in up | resume | watch | create)
    [[ -n $type ]] || die "which TPU? type --type, such as --type v5litepod-16; it decides what this costs"
    version=${version:-$(runtime_version)}
    ;;
  esac
  case $command in up | resume | watch | setup)
    [[ $storage =~ ^(gs://[a-z0-9._-]+|[A-Za-z0-9.-]+:/[A-Za-z0-9./_-]+|none)$ ]] ||
      die "--storage has to be HOST:/SHARE, gs://BUCKET or none, found '$storage'"
    [[ -z $init || -f $init ]] || die "--init: no file $init"
    [[ -f pyproject.toml && -d gpt2_jax ]] || die "start this in the checkout that is to be copied, found $PWD"
    ;;
  esac
  case $command in
    up | resume | watch | run | exec) (($#)) || die "$command what? type it after --, such as -- --config gpt2-124m" ;;
    *) (($# == 0)) || die "$command takes nothing after --, found $*" ;;
  esac
  [[ -n $dry_run ]] || command -v gcloud > /dev/null || die "no gcloud here (cloud.google.com/sdk/docs/install)"
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT

  case $command in
    resume) up "$@" ;;
    exec) on all "cd ~/gpt2_jax && source .venv/bin/activate && $*" ;;
    *) "$command" "$@" ;;
  esac
}

main "$@"
