# Sourced by scripts/slurm/train.sh, in the repository's root: Python's environment, where the ranks meet, starting again.

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# sed reads all of it: head would leave early, and under pipefail scontrol could die of the closed pipe.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-12805}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

# A job that is warned of its end (--signal) or preempted queues itself again (--requeue_on_preempt), and Slurm does so
# where a node fails (--requeue). This is for a rank that hung (exit code 124) or was killed (128 + signal), RESTARTS
# times at most; any other failure would only come again. A job that is cancelled is no longer RUNNING.
start_again() {
  local code=$1
  if [ "$code" -ne 124 ] && [ "$code" -le 128 ]; then return; fi
  if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" != RUNNING ]; then return; fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-5}" ]; then
    echo "a rank hung or was killed (exit code $code), and RESTARTS=${RESTARTS:-5} are used up"
  else
    echo "a rank hung or was killed (exit code $code): the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
}
trap 'start_again $?' EXIT
