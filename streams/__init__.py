"""Stream processing: user actions in, fresh user embeddings out. Read this page first: it walks through a batch's life.

One worker process runs one event loop and one encoder thread. Per source partition it holds a `PartitionState` in
memory, a RocksDB store on disk and a transactional producer.

 1. **Fetch.** `engine.delivery` hands over all records of one fetch at once: a `RecordBatch` per partition, with the
    positions at which it begins and ends. Faust does not commit offsets; checkpoints do.
 2. **Accept.** `ingest` takes a batch to `engine.partitions`, which accepts it only if it continues where the last one
    ended. A stale batch is ignored; after a gap the consumer seeks back. If the encode queue is full, ingest waits.
 3. **Decode.** `wire.actions` turns records into columns and rejects invalid ones, each with a reason.
    `wire.dead_letters` adds headers, `engine.outputs` sends the record to the dead-letter topic.
 4. **Load.** `core.partition_state` reports which users of the batch are not in memory, and evicts idle users to make
    room. `storage.reader` reads the missing users from `storage.store` (bytes by `storage.codec`).
 5. **Apply.** `PartitionState.apply`: `core.sequences` appends the actions to each user's ring, and merges late events,
    duplicates and tombstones (`core.merge`). `core.triggers` decides by the policy (`core.policy`) which users are due.
    Users that are not due yet get a deadline in the wheel of `core.deadlines`. The result is data: `core.effects`.
 6. **Queue.** `ingest` performs the effects. Due users enter the `encoding.queue`, at most one entry per user, by
    priority. Every 50 ms it also fires due timers, so that a user is encoded even if it does not act again.
 7. **Encode.** The queue begins a job (`core.jobs`) per partition with each user's sequence as of that moment, joins
    the jobs to a micro-batch, and embeds it with the runtime of `encoder.inference` in the encoder thread.
 8. **Publish.** `encoding.partition_jobs` drops outdated embeddings; `engine.outputs` appends the rest to the output
    topic in the format of `wire.embeddings`. The acknowledgement finishes the job, and its users are no longer due.
 9. **Checkpoint.** Once per interval `storage.checkpoint` takes a snapshot of the users that changed
    (`core.snapshots`). It waits for outputs, then writes changelog records and the source offset in one transaction
    (`engine.changelog`), then the same records to the store.

After a crash or a rebalance, `engine.partitions` acquires a partition: it fences the predecessor, brings the store to
the end of the changelog (`engine.restore`), proves by the checkpoint mark that nothing is missing, reads what has been
published since, and continues at step 1. No event is lost or applied twice, because the source offset is committed
together with the state, and being due is part of that state.

Around this: `cli` and `config` (settings), `parts` and `app` (composition), `worker` (life of the process), `health`
and `telemetry` (readiness, metrics), `errors` (by consequence), and for other programs `subscriber` and `producer`.
"""
