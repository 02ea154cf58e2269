# One shard of a file: lines of $INPUT, by $JOB_COMPLETION_INDEX out of $SHARDS, into $OUTPUT. A shard that is there is done:
# it is written aside and gets its name when it is whole and on the disk. $PARAMETERS are flags of `transduce translate`.
set -euo pipefail

shard=$(printf '%05d-of-%05d' "$JOB_COMPLETION_INDEX" "$SHARDS")
mkdir -p "$OUTPUT"
if [ -e "$OUTPUT/$shard" ]; then
  echo "$shard is done already"
  exit 0
fi
aside="$OUTPUT/.$shard.$HOSTNAME" # two pods of one index are rare, but a lost node's may still write
# Shards are of like size in bytes and end where a line does; one after the other they are the file.
split --number="l/$((JOB_COMPLETION_INDEX + 1))/$SHARDS" "$INPUT" \
  | transduce translate ${PARAMETERS:-} --output "$aside"
sync "$aside"
mv "$aside" "$OUTPUT/$shard"
rm -f "$OUTPUT/.$shard".* # what pods that were killed have left
echo "$shard is done"
