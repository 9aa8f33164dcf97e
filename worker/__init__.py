"""One process per tensor-parallel rank: holds weights and KV memory, replays the scheduler's plans, samples."""
