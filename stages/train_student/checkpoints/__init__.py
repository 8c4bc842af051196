"""Checkpoints that are whole or not there: writing, finding, loading and dropping them.

    <run_dir>/checkpoints/
        checkpoint-500/                  DeepSpeed's files, one set per rank, and what others add
        checkpoint-500.complete.json     step, processes, every file's size and CRC-32C;
                                     written last

DeepSpeed's own `latest` file is not used: it is written before the last rank has finished. Here
every rank reads its files back for their checksums, every node syncs them, all ranks meet, and then
rank 0 writes the record (temporary file, sync, rename). A folder without a fitting record is never
loaded, nor one whose files have other checksums. The training loop uses this.
"""
