"""Atomic checkpoints: saving, finding, verifying, loading and removing them.

    <run_dir>/checkpoints/
        checkpoint-500/                  DeepSpeed's files, one set per rank, and extra state (EMA)
        checkpoint-500.complete.json     step, processes, size and CRC-32C of every file;
                                         written last

DeepSpeed's own `latest` file is not used: it is written before the last rank has finished. Here
every rank reads its files back to compute checksums, every node syncs them, all ranks synchronise,
and then rank 0 writes the record (temporary file, sync, rename). A folder without a matching record
is never loaded, nor one whose checksums differ.
"""
