"""Places requests: queue, KV blocks, prefix cache, preemption. Integers in, plans out; never text, never torch."""
