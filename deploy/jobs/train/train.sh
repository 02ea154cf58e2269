# One node of a training run: $NODES of them, this one $JOB_COMPLETION_INDEX. A run that has begun goes on from its last
# checkpoint, which every node reads: $RUN lies on a volume that all of them share.
set -euo pipefail

resume=()
if [ -e "$RUN/last.pt" ]; then
  resume=(--resume)
fi
exec torchrun \
  --nnodes="$NODES" --node-rank="$JOB_COMPLETION_INDEX" --nproc-per-node="$PROCESSES" \
  --master-addr="$FIRST" --master-port=29500 \
  --no-python transduce train --recipe "$RECIPE" --data "$DATA" --holdout 0.01 --output "$RUN" "${resume[@]}"
