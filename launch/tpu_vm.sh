#!/usr/bin/env bash
# Trains on a Cloud TPU VM, or on all hosts of a TPU slice. Needs only gcloud. See the usage below.
# The script stores nothing locally: the flags and the state of the TPU are enough, so any machine can run it.
set -euo pipefail

usage() {
  cat << 'END'
usage: launch/tpu_vm.sh COMMAND NAME --zone ZONE [flags] [-- arguments of python -m gpt2_jax.train]

  up       create the TPU, set it up and start the training, as far as needed; run it again after a preemption or a
           crash to resume
  resume   the same as up
  watch    up, and up again after every preemption or crash, until the training ends
  create   request the TPU: on demand or --spot, immediately or --queued
  setup    copy this checkout to every worker, install it and mount --storage
  run      start the training on every worker; it keeps running when this terminal closes
  status   show the state of the TPU and of the training on every worker
  logs     follow the log of worker 0, or of --worker N
  stop     send SIGTERM: every worker finishes its update and saves; resume with run
  exec     run a shell command in the checkout on every worker: exec NAME --zone ZONE -- COMMAND
  delete   delete the TPU and its disks

  --zone ZONE          for example us-west4-a (cloud.google.com/tpu/docs/regions-zones)
  --type TYPE          accelerator type: v4-32, v5litepod-16, v5p-8, v6e-16, ... (for up, watch, create)
  --spot               cheaper, but preempted at any time
  --queued             request a queued resource, which waits until a TPU is free; give it to status and delete as well
  --storage WHERE      storage of runs/ (for up, watch, setup): HOST:/SHARE for NFS, gs://BUCKET for a bucket,
                       none for the TPU's own disk, which is deleted with the TPU
  --init FILE          bash script that setup runs in the checkout on every worker before it mounts --storage, for
                       example to fetch data/, or to install gcsfuse for gs:// if the image lacks it
  --version VERSION    software version of the TPU VM; by default the one for --type
  --project PROJECT    by default the project of gcloud's configuration
  --create-flag=FLAG   an extra flag for gcloud's create, for example --create-flag=--reserved; may be repeated
  --worker N           the worker whose log to follow
  --dry-run            print the commands without running them

A TPU costs money from READY until you delete it, idle or not: 16 chips at, say, 1.20 $ an hour each are 461 $ a day.
END
}

die() {
  echo "error: $*" >&2
  exit 2
}

# Prints a command, quoted for the shell.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

# Prints a command and runs it; with --dry-run only prints it.
call() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

tpus() { call gcloud compute tpus "$@" --zone="$zone" "${project[@]}"; }

# on WORKER SCRIPT: runs a shell script on one worker, or on `all` in parallel.
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# Prints another command of this script for the same TPU, for the user to type.
next() { quoted "$0" "$1" "$name" --zone "$zone" ${queued:+--queued} "${project[@]}"; }

runtime_version() {
  case $type in # cloud.google.com/tpu/docs/runtimes
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "unknown software version for --type $type; type --version (cloud.google.com/tpu/docs/runtimes)" ;;
  esac
}

# Prints the state of the TPU, or ABSENT if it does not exist. Fails if gcloud fails in any other way: a TPU that gcloud
# cannot see must not be created twice.
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

# Waits until the TPU is ready. Creates it if it does not exist, replaces it if it was preempted.
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
      # Without a metadata cache, so that every worker sees the files that another one writes.
      mount="gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 $bucket ~/storage"
      ;;
    *) mount="{ sudo apt-get install -qq -y nfs-common && sudo mount -t nfs $storage ~/storage; }" ;;
  esac
  if [[ -z $dry_run ]]; then
    archive=$temporary/$archive
    # All files that git tracks or does not ignore, as they are now, including a config that is not committed yet.
    git ls-files -z --cached --others --exclude-standard --deduplicate |
      while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
      tar --create --gzip --null --files-from=- --file="$archive"
  fi
  tpus tpu-vm scp "$archive" "$name:gpt2_jax.tar.gz" --worker=all
  [[ -z $init ]] || tpus tpu-vm scp "$init" "$name:gpt2_jax_init.sh" --worker=all
  # These images have Python 3.10, so uv installs a newer one.
  on all "set -e
mkdir -p ~/gpt2_jax ~/storage ~/training
cd ~/gpt2_jax
tar -xzf ~/gpt2_jax.tar.gz
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.13 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
${init:+(source .venv/bin/activate; bash ~/gpt2_jax_init.sh)
}mountpoint -q ~/storage || $mount
mkdir -p ~/storage/runs
[ -e runs ] || ln -s ~/storage/runs runs
[ -e data ] || ln -sfn ~/storage/data data"
}

# Starts the training, which holds a lock while it runs. A process id alone could belong to another process by now.
run() {
  on all "cd ~/gpt2_jax || exit
flock -n ~/training/lock true || { echo \"\$HOSTNAME: already running\"; exit 0; }
rm -f ~/training/pid ~/training/exit_code
setsid nohup flock -w 10 ~/training/lock bash -c \
'\"\$@\" & echo \$! > ~/training/pid; wait \$!; echo \$? > ~/training/exit_code' training \
.venv/bin/python -m gpt2_jax.train $(quoted "$@") < /dev/null >> ~/training/log 2>&1 &
timeout 20 sh -c 'until [ -s ~/training/pid ]; do sleep 0.1; done'"
}

# Prints the state of the training, one line per worker.
training() {
  on all "cd ~/training 2> /dev/null || { echo \"\$HOSTNAME: not set up\"; exit 0; }
if ! flock -n lock true; then echo \"\$HOSTNAME: running\"
elif [ -s exit_code ]; then echo \"\$HOSTNAME: ended with exit code \$(cat exit_code)\"
elif [ -e log ]; then echo \"\$HOSTNAME: died without an exit code\"
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

# Exits with 0 when the training is done, 2 if it rejects its input (it would again), 143 if somebody stopped it.
watch() {
  local crashes=0 stopped code now report
  while ((crashes < 3)); do
    # In a separate process, so that a failure of `up`, such as no free spot TPU, does not end this one.
    code=0
    "$0" up "${given[@]}" || code=$?
    ((code != 2)) || exit 2
    if ((code)); then
      now=$(state) || now=unknown # for example without a network
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
        ABSENT) echo "error: somebody deleted $name" >&2 && exit 1 ;;
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
        die "the training rejects its input; to see why, type: $(next logs)"
      elif grep -q ' code 143$' <<< "$report"; then
        ((++stopped < 5)) || exit 143 # a preemption also sends SIGTERM, but the TPU soon leaves READY
      else
        ((++crashes))
        break
      fi
    done
  done
  echo "error: crashed $crashes times; to see why, type: $(next logs)" >&2
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
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "found bash $BASH_VERSION; expected 4.4 or newer"
  local command=${1:-} flag
  case $command in
    up | resume | watch | create | setup | run | status | logs | stop | exec | delete) shift ;;
    -h | --help) usage && exit ;;
    '') usage >&2 && exit 2 ;;
    *) die "unknown command $command; type $0 --help" ;;
  esac
  given=("$@") name=${1:-} zone='' type='' spot='' queued='' storage='' init='' version='' worker=0 dry_run=''
  create_flags=() project=() poll=${POLL_SECONDS:-30} temporary=''
  [[ $name != -h && $name != --help ]] || { usage && exit; }
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    die "found '$name' after $command; expected the TPU's name (a-z, 0-9, -)"
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
      *) die "unknown flag $flag; type $0 --help; flags for the training go after --" ;;
    esac
    shift 2
  done
  (($# == 0)) || shift # the --

  [[ -n $zone ]] || die "no zone; type --zone, for example --zone us-west4-a"
  case $command in up | resume | watch | create)
    [[ -n $type ]] || die "no accelerator type; type --type, for example --type v5litepod-16; it determines the cost"
    version=${version:-$(runtime_version)}
    ;;
  esac
  case $command in up | resume | watch | setup)
    [[ $storage =~ ^(gs://[a-z0-9._-]+|[A-Za-z0-9.-]+:/[A-Za-z0-9./_-]+|none)$ ]] ||
      die "--storage is '$storage'; expected HOST:/SHARE, gs://BUCKET or none"
    [[ -z $init || -f $init ]] || die "--init: $init does not exist"
    [[ -f pyproject.toml && -d gpt2_jax ]] ||
      die "$PWD is not a checkout of gpt2_jax; run this in the one to copy to the workers"
    ;;
  esac
  case $command in
    up | resume | watch | run) (($#)) || die "$command needs arguments after --: type -- --config gpt2-124m" ;;
    exec) (($#)) || die "exec needs a command after --: type -- COMMAND" ;;
    *) (($# == 0)) || die "found $* after --; $command takes no arguments there" ;;
  esac
  [[ -n $dry_run ]] || command -v gcloud > /dev/null ||
    die "gcloud is not installed; see cloud.google.com/sdk/docs/install"
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT

  case $command in
    resume) up "$@" ;;
    exec) on all "cd ~/gpt2_jax && source .venv/bin/activate && $*" ;;
    *) "$command" "$@" ;;
  esac
}

main "$@"
